"""Page accounting: who owns a page, which tokens a free page still holds, and that nobody gets another's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from engine import InputError
from engine.kv_pool import PagePool, RowPool
from engine.request import FinishReason, Request
from tests.test_scheduler import request_of


def computed(pool: PagePool, prompt: list[int], name: str = "r") -> Request:
    """A request admitted to the pool, with all of its tokens computed."""
    request = request_of(name, prompt)
    assert pool.admit(request)
    request.computed = len(prompt)
    pool.cache_full_pages(request)
    pool.check_integrity()
    return request


def cached(pool: PagePool, prompt: list[int]) -> int:
    """How many tokens of this prompt a request would find computed."""
    request = request_of("probe", prompt)
    assert pool.admit(request)
    pool.release(request)
    pool.check_integrity()
    return request.computed


def test_a_prefix_is_found_up_to_whole_pages_and_never_the_last_token():
    pool = PagePool(20, 4)
    first = computed(pool, list(range(10)))
    assert cached(pool, list(range(10))) == 8
    assert cached(pool, list(range(9))) == 8
    assert cached(pool, list(range(8))) == 4, "the last token's logits are needed"
    assert cached(pool, [0, 1, 2, 3, 9, 9, 9, 9, 9]) == 4
    assert cached(pool, [9, 1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert cached(pool, [4, 5, 6, 7, 4]) == 0, "the same tokens after others are not the same"
    assert cached(pool, [0]) == 0
    second = request_of("second", list(range(10)))
    pool.admit(second)
    assert pool.tables[second][:2] == pool.tables[first][:2]
    assert pool.tables[second][2] != pool.tables[first][2]


def test_pages_of_one_token_share_all_but_the_last():
    pool = PagePool(20, 1)
    computed(pool, [5, 6, 7])
    assert cached(pool, [5, 6, 7]) == 2
    assert cached(pool, [5, 6, 7, 8]) == 3


def test_without_prefix_caching_nothing_is_found():
    pool = PagePool(20, 2, prefix_caching=False)
    computed(pool, [1, 2, 3, 4, 5])
    assert cached(pool, [1, 2, 3, 4, 5]) == 0


def test_only_computed_tokens_are_found():
    pool = PagePool(20, 2)
    request = request_of("r", [1, 2, 3, 4, 5, 6])
    pool.admit(request)
    for done, found in ((1, 0), (3, 2), (4, 4), (5, 4)):
        request.computed = done
        pool.cache_full_pages(request)
        assert cached(pool, [1, 2, 3, 4, 5, 6, 7]) == found


class Collides(int):
    """A token whose hash is that of every other."""

    def __hash__(self) -> int:
        return 1


def test_equal_hashes_are_not_equal_tokens():
    pool = PagePool(40, 2)
    computed(pool, [Collides(i) for i in range(9)])
    assert cached(pool, [Collides(i) for i in range(9)]) == 8
    assert cached(pool, [Collides(i) for i in (0, 1, 2, 4, 4, 5, 6)]) == 2
    assert cached(pool, [Collides(i) for i in range(10, 17)]) == 0


def test_two_that_compute_the_same_keep_their_own_and_one_is_found():
    pool = PagePool(20, 2)
    pair = [request_of(name, [1, 2, 3, 4, 5]) for name in "ab"]
    for request in pair:
        assert pool.admit(request)
    for request in pair:
        request.computed = 5
        pool.cache_full_pages(request)
    a, b = (pool.tables[request] for request in pair)
    assert not set(a) & set(b)
    pool.release(pair[0])
    assert cached(pool, [1, 2, 3, 4, 5]) == 4
    pool.release(pair[1])
    pool.check_integrity()


def test_a_chain_through_anothers_page_is_found_after_both_are_gone():
    pool = PagePool(20, 2)
    pair = [request_of("a", [1, 2, 3, 4, 5]), request_of("b", [1, 2, 3, 4, 6, 7, 8])]
    for request in pair:
        pool.admit(request)
    for request in pair:
        request.computed = len(request.tokens)
        pool.cache_full_pages(request)
    for request in pair:
        pool.release(request)
    assert cached(pool, [1, 2, 3, 4, 6, 7, 8]) == 6


def test_the_least_recently_freed_goes_first_and_beginnings_stay_longest():
    pool = PagePool(6, 2)
    old, new = computed(pool, [1, 1, 1, 1]), computed(pool, [2, 2, 2, 2])
    pool.release(new)
    pool.release(old)
    three = computed(pool, [3] * 6)  # two pages that held nothing, then the end of the older
    assert request_found(pool, [2] * 5) == 2
    assert request_found(pool, [1] * 5) == 4
    assert pool.reserve(three, 8)
    assert request_found(pool, [2] * 5) == 0
    assert request_found(pool, [1] * 5) == 4
    assert pool.reserve(three, 10)
    assert request_found(pool, [1] * 5) == 2
    pool.release(three)


def request_found(pool: PagePool, prompt: list[int]) -> int:
    return len(list(pool._match(prompt))) * pool.page_size


def test_a_free_page_keeps_its_tokens_until_it_is_needed():
    pool = PagePool(4, 2)
    pool.release(computed(pool, [1, 2, 3, 4]))
    assert pool.pages_used == 0
    assert request_found(pool, [1, 2, 3, 4, 5]) == 4
    other = request_of("other", [9] * 8)
    assert pool.admit(other)
    assert pool.pages_used == 4
    assert request_found(pool, [1, 2, 3, 4, 5]) == 0


def test_pages_of_the_failed_are_not_found_and_are_zeroed_before_their_next_use():
    pool = PagePool(10, 2)
    good = computed(pool, [1, 2, 3])
    failed = request_of("failed", [1, 2, 3, 4, 5, 6, 7])
    assert pool.admit(failed)
    shared, *own = pool.tables[failed]
    failed.computed = 7
    pool.cache_full_pages(failed)
    failed.finish(FinishReason.ERROR, error="NaN")
    pool.release(failed)
    assert request_found(pool, [1, 2, 3, 4, 5, 6, 7]) == 0
    assert pool.admit(request_of("other", [9] * 16))
    assert set(pool.needs_zeroing) == set(own), "and no others"
    assert pool.tables[good][0] == shared
    pool.check_integrity()


@pytest.mark.parametrize("reason", [FinishReason.ABORT, None])
def test_pages_that_no_token_has_proven_finite_are_zeroed_too(reason):
    """Of a request that left in the middle of its prompt; whoever begins the same may have them."""
    pool = PagePool(4, 2)
    request = computed(pool, [1, 2, 3, 4, 5])
    if reason is not None:
        request.finish(reason)
    table = list(pool.tables[request])
    pool.release(request)
    assert request_found(pool, [1, 2, 3, 4, 5]) == 4
    assert pool.needs_zeroing == []
    assert pool.admit(request_of("other", [9] * 8))
    assert set(pool.needs_zeroing) == set(table)


def test_a_store_that_is_lost_is_forgotten():
    pool = PagePool(4, 2)
    request = computed(pool, [1, 2, 3, 4, 5])
    with pytest.raises(RuntimeError, match="requests hold pages"):
        pool.forget_all()
    pool.release(request)
    pool.forget_all()
    assert request_found(pool, [1, 2, 3, 4, 5]) == 0
    pool.check_integrity()


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT])
def test_pages_of_others_are_clean_and_found(reason):
    pool = PagePool(10, 2)
    request = computed(pool, [1, 2, 3, 4, 5])
    request.finish(reason)
    pool.release(request)
    assert pool.needs_zeroing == []
    assert request_found(pool, [1, 2, 3, 4, 5]) == 4


def test_what_does_not_fit_takes_nothing():
    pool = PagePool(4, 2)
    holder = computed(pool, [1, 2, 3, 4, 5])
    late = request_of("late", [1, 2, 3, 4, 5, 6, 7])  # two pages in common, two more needed, one free
    assert not pool.admit(late)
    assert late.computed == 0
    assert late not in pool.tables
    assert pool.pages_used == 3
    pool.check_integrity()
    assert not pool.reserve(holder, 9)
    assert pool.pages_used == 3
    assert pool.reserve(holder, 8)
    assert pool.unused([holder]) == 3
    pool.release(holder)
    assert pool.admit(late)
    assert late.computed == 4


def test_check_names_the_request_and_the_bound():
    with pytest.raises(
        InputError, match=r"request r: a prompt of 6 tokens with max_new_tokens=4 .* it holds 8"
    ):
        PagePool(4, 2).check(request_of("r", [1] * 6))
    PagePool(4, 2).check(request_of("r", [1] * 5))


@settings(max_examples=5 * settings().max_examples)
@given(
    size=st.integers(1, 4),
    pages=st.integers(1, 12),
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(0, 7)), max_size=25
    ),
)
def test_what_is_found_was_computed_by_somebody_in_just_that_place(size, pages, prompts):
    """Contents of pages are modelled as whole prefixes; some requests leave at once, some stay, some fail."""
    pool = PagePool(pages, size)
    contents: dict[int, tuple[int, ...]] = {}
    held: list[Request] = []
    for at, (prompt, fate) in enumerate(prompts):
        request = request_of(at, prompt)
        if not pool.admit(request):
            assert not set(pool.tables) - set(held)
            if held:
                pool.release(held.pop(0))
            continue
        assert request.computed < len(prompt)
        assert request.computed % size == 0
        table = pool.tables[request]
        assert len(table) == -(-len(prompt) // size)
        for i in range(request.computed // size):
            assert contents[table[i]] == tuple(prompt[: (i + 1) * size])
        for i in range(request.computed // size, len(table)):
            assert all(table[i] not in pool.tables[other] for other in held), "owned twice"
            contents[table[i]] = tuple(prompt[: (i + 1) * size])
        request.computed = len(prompt)
        pool.cache_full_pages(request)
        pool.check_integrity()
        if fate < 3:
            held.append(request)
        else:
            request.finish(FinishReason.ERROR if fate == 7 else FinishReason.STOP)
            pool.release(request)
            assert fate != 7 or all(page not in pool._keys or pool._references[page] for page in table)
        pool.check_integrity()
    for request in held:
        pool.release(request)
    assert pool.pages_used == 0
    pool.check_integrity()


def test_rows_are_a_rectangle_of_the_longest_prompt_and_output():
    pool = RowPool(60)
    long, short = request_of("long", [1] * 20, 4), request_of("short", [1] * 2, 10)
    assert pool.admit(long)
    long.computed = 20
    assert pool.unused([long]) == 3, "its last token is not computed"
    assert pool.admit(short)
    short.computed = 2
    assert pool.unused([short]) == 27, "as wide as the longest prompt and the longest output"
    assert not pool.admit(request_of("third", [1]))
    assert pool.reserve(short, 12)
    pool.cache_full_pages(short)
    pool.release(long)
    assert pool.admit(request_of("third", [1]))
    assert pool.unused([short]) == 9


def test_rows_refuse_what_can_never_fit():
    RowPool(23).check(request_of("r", [1] * 20, 4))
    with pytest.raises(InputError, match="needs 23 positions of KV memory; it holds 22"):
        RowPool(22).check(request_of("r", [1] * 20, 4))
