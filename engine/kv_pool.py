"""Who may hold KV memory: pages and their owners, and what past requests left in them. Pure Python, no
tensors.

A pool answers the scheduler: `check` (could it ever fit), `admit`, `reserve` (room for more of its tokens),
`cache_full_pages` (these tokens are computed), `unused` and `release`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from engine.errors import InputError
from engine.request import FinishReason, Request


class _Pool:
    """Positions (tokens of one request), of which a request may not need more than there are."""

    capacity: int

    def check(self, request: Request) -> None:
        """Raise InputError if the request could not run even alone."""
        if request.max_positions > self.capacity:
            raise InputError(
                f"request {request.id}: a prompt of {request.prompt_len} tokens with max_new_tokens="
                f"{request.params.max_new_tokens} needs {request.max_positions} positions of KV memory; "
                f"it holds {self.capacity}: raise kv_memory or ask for less"
            )


class PagePool(_Pool):
    """Pages of `page_size` tokens, block tables, reference counts and the prefix cache.

    A full page whose tokens are computed can be shared by every request with the same tokens up to its end:
    it is found by the page before it and its own tokens, compared exactly, so no hash collision can give out
    another's. Nobody writes to it again. A freed page keeps its tokens until it is needed, least recently
    freed first.

    Args:
        pages: how many there are.
        page_size: tokens a page holds, >= 1.
        prefix_caching: whether to find and keep computed pages at all.
    """

    def __init__(self, pages: int, page_size: int, prefix_caching: bool = True) -> None:
        self.pages, self.page_size, self.capacity = pages, page_size, pages * page_size
        self.prefix_caching = prefix_caching
        self.tables: dict[Request, list[int]] = {}
        self.needs_zeroing: list[int] = []  # pages that may hold NaN: clear them before the next step
        self._contaminated: set[int] = set()  # held or written by a request that got no finite token
        self._references = [0] * pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        # (mark of the page before, tokens) -> page
        self._cached: dict[tuple[object, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[object, tuple[int, ...]]] = {}  # the reverse
        self._content_keys: dict[int, object] = {}  # cached page -> an object that no other contents have
        # pages of a request seen by `cache_full_pages`; content key of the last
        self._full_pages: dict[Request, tuple[int, object]] = {}

    def admit(self, request: Request) -> bool:
        """Give the request what is cached of it and pages for all of its tokens, or nothing; True if given.

        Cached tokens are marked as computed, but never the last one: its logits are needed.
        """
        shared = list(self._match(request.tokens))
        for page in shared:
            self._acquire(page)
        self.tables[request] = shared
        self._full_pages[request] = len(shared), self._content_keys[shared[-1]] if shared else None
        if not self.reserve(request, len(request.tokens)):
            self.release(request)
            return False
        request.computed = self._full_pages[request][0] * self.page_size
        return True

    def reserve(self, request: Request, tokens: int) -> bool:
        """Make the request's table hold its first `tokens` tokens; False, and nothing taken, if pages
        lack."""
        table = self.tables[request]
        if tokens <= len(table) * self.page_size:
            return True
        need = -(-tokens // self.page_size) - len(table)
        if need > len(self._free):
            return False
        for _ in range(need):
            page = next(iter(self._free))
            self._forget(page)
            self._acquire(page)
            if page in self._contaminated:
                self._contaminated.remove(page)
                self.needs_zeroing.append(page)
            table.append(page)
        return True

    def cache_full_pages(self, request: Request) -> None:
        """Let others find those of its pages that have become full of computed tokens."""
        if not self.prefix_caching:
            return
        size, (done, content_key) = self.page_size, self._full_pages[request]
        if request.computed < (done + 1) * size:
            return
        table = self.tables[request]
        full = min(request.computed, len(request.tokens)) // size  # the last computed token may be pending
        for at in range(done, full):
            key = (content_key, tuple(request.tokens[at * size : (at + 1) * size]))
            page = self._cached.setdefault(key, table[at])
            if page == table[at]:  # the first with these tokens
                self._keys[page], self._content_keys[page] = key, object()
            content_key = self._content_keys[page]
        self._full_pages[request] = full, content_key

    def release(self, request: Request) -> None:
        """Give back its pages; the last goes first, so that the beginning of a prompt is kept longest."""
        del self._full_pages[request]
        table = self.tables.pop(request)
        failed = request.finish_reason is FinishReason.ERROR
        if failed or not request.output_len:  # nobody has seen yet whether its numbers are finite
            self._contaminated.update(table)
        for page in table if failed else ():
            self._forget(page)
        for page in reversed(table):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
                if page not in self._keys:
                    self._free.move_to_end(page, last=False)  # nothing worth keeping: reuse it first

    def forget_all(self) -> None:
        """Let nobody find what pages held; for a store whose contents are lost.

        Raises:
            RuntimeError: while a request holds pages.
        """
        if self.tables:
            raise RuntimeError("requests hold pages: wait until they have ended")
        for page in list(self._keys):
            self._forget(page)

    @property
    def pages_used(self) -> int:
        """Pages that some request holds."""
        return self.pages - len(self._free)

    @property
    def usage(self) -> float:
        """The share of all pages that some request holds."""
        return 1 - len(self._free) / self.pages

    def unused(self, requests: Sequence[Request]) -> int:
        """Positions of their pages beyond their computed tokens."""
        pages = sum([len(self.tables[request]) for request in requests])
        return pages * self.page_size - sum([request.computed for request in requests])

    def check_integrity(self) -> None:
        """Assert that every page is free or owned as often as it is counted, and that the cache agrees with
        itself."""
        for request, table in self.tables.items():
            assert len(set(table)) == len(table), "a request holds a page twice"
            assert len(table) * self.page_size >= request.computed, "computed tokens without a page"
        counts = Counter(page for table in self.tables.values() for page in table)
        assert [counts[page] for page in range(self.pages)] == self._references
        assert set(self._free) == {page for page, count in enumerate(self._references) if count == 0}
        assert self._keys == {page: key for key, page in self._cached.items()}
        assert self._content_keys.keys() == self._keys.keys()
        shared = {page for page, count in counts.items() if count > 1}
        assert shared <= self._keys.keys() | self._contaminated

    def _match(self, tokens: list[int]) -> Iterable[int]:
        content_key, size = None, self.page_size
        for at in range((len(tokens) - 1) // size if self.prefix_caching else 0):
            page = self._cached.get((content_key, tuple(tokens[at * size : (at + 1) * size])))
            if page is None:
                return
            content_key = self._content_keys[page]
            yield page

    def _acquire(self, page: int) -> None:
        if self._references[page] == 0:
            del self._free[page]
        self._references[page] += 1

    def _forget(self, page: int) -> None:
        """Its contents are about to change: nobody may find it by them."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._cached[key], self._content_keys[page]


class RowPool(_Pool):
    """The padded runner's rectangle: as many rows as requests, each as wide as the longest prompt and output
    need.

    Args:
        capacity: positions (tokens of one request) that fit in KV memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: list[Request] = []

    def admit(self, request: Request) -> bool:
        """Give the request a row for all it may become, if the batch still fits then."""
        batch = [*self._held, request]
        fits = len(batch) * _width(batch) <= self.capacity
        if fits:
            self._held = batch
        return fits

    def reserve(self, request: Request, tokens: int) -> bool:
        """A row is as wide as it will ever be."""
        return True

    def cache_full_pages(self, request: Request) -> None:
        """Rows are not shared."""

    def release(self, request: Request) -> None:
        """Give the row back."""
        self._held.remove(request)

    @property
    def usage(self) -> float:
        """The share of all positions that rows hold."""
        return len(self._held) * _width(self._held) / self.capacity if self._held else 0.0

    def unused(self, requests: Sequence[Request]) -> int:
        """Positions of their rows beyond their computed tokens."""
        return len(requests) * _width(self._held) - sum([request.computed for request in requests])


def _width(batch: list[Request]) -> int:
    return max(r.prompt_len for r in batch) + max(r.params.max_new_tokens for r in batch) - 1
