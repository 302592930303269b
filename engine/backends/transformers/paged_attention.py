"""Attention over pages with torch alone: written to be read, and right for whatever a layer's options are.

T tokens of the batch, H query heads, K KV heads, D head size, E that of values, X pages, P positions of a
page. In a group of R requests: N tokens of each, C positions of the longest context.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.backends.zeros import zeros
from engine.models.attention_trace import Attention, AttentionCall, Options
from engine.step import Batch, Span


@dataclass(frozen=True, slots=True)
class Store:
    """Keys and values of one layer."""

    keys_XPKD: torch.Tensor
    values_XPKE: torch.Tensor

    @classmethod
    def zeros(
        cls, pages: int, page_size: int, kv_heads: int, key_dim: int, value_dim: int, like: torch.Tensor
    ) -> Store:
        """Make room for so many pages: zeros, since what a mask hides is multiplied too, and 0 hides no
        NaN."""
        shape = pages, page_size, kv_heads
        return cls(zeros((*shape, key_dim), like), zeros((*shape, value_dim), like))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.keys_XPKD[0].nbytes + self.values_XPKE[0].nbytes

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        self.keys_XPKD[pages], self.values_XPKE[pages] = 0, 0


class Group(NamedTuple):
    """Requests that compute equally many tokens, over contexts of similar length: one product for all of
    them."""

    tokens_RN: torch.Tensor  # places in the batch
    positions_RN: torch.Tensor
    pages_RX: torch.Tensor  # of each context, filled up with the page of nobody


class PagedBatch(Attention):
    """A batch's tokens, and the pages that they read and write.

    Args:
        stores: keys and values, one a layer; layers may share one.
        nobody: a page that stays zero.
    """

    def __init__(self, stores: list[Store], batch: Batch, nobody: int) -> None:
        self._stores = stores
        self._page_size, device = stores[0].keys_XPKD.shape[1], stores[0].keys_XPKD.device
        alike: dict[tuple[int, int], list[Span]] = defaultdict(list)
        slots: list[int] = []
        for span in batch.spans:
            positions = range(span.computed, span.computed + span.end - span.begin)
            slots += [
                span.pages[at // self._page_size] * self._page_size + at % self._page_size for at in positions
            ]
            # Contexts of a group differ by less than two times, so most of what is read is of use.
            alike[len(positions), self._pages(span).bit_length()].append(span)
        self._slots_T = torch.tensor(slots, device=device)
        self._groups = [self._group(spans, nobody, device) for spans in alike.values()]
        self._seen: dict[int | None, list[torch.Tensor]] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Write the batch's keys and values into their pages and attend; return [1, T, H, E].

        Raises:
            InputError: for a mask, which this would have to ignore.
        """
        if call.mask is not None:
            call.refuse("uses a mask")
        options, store = call.options, self._stores[call.layer]
        q_1HTD = call.q_1HTD * options.scale
        q_THD, k_TKD, v_TKE = (x[0].transpose(0, 1) for x in (q_1HTD, call.k_1KTD, call.v_1KTD))
        store.keys_XPKD.flatten(0, 1)[self._slots_T] = k_TKD
        store.values_XPKE.flatten(0, 1)[self._slots_T] = v_TKE
        out_THE = q_THD.new_empty(*q_THD.shape[:2], v_TKE.shape[2])
        for group, seen_RNC in zip(self._groups, self._seen_by(options.window), strict=True):
            k_RKCD, v_RKCE = (
                pages_XPKD[group.pages_RX].flatten(1, 2).transpose(1, 2)
                for pages_XPKD in (store.keys_XPKD, store.values_XPKE)
            )
            q_RHND = q_THD[group.tokens_RN].transpose(1, 2)
            out_THE[group.tokens_RN] = _attend(q_RHND, k_RKCD, v_RKCE, seen_RNC, options).transpose(1, 2)
        return out_THE[None]

    def _pages(self, span: Span) -> int:
        """Return how many pages hold a span's request up to its last token."""
        return -(-(span.computed + span.end - span.begin) // self._page_size)

    def _group(self, spans: list[Span], nobody: int, device: torch.device) -> Group:
        count, pages = spans[0].end - spans[0].begin, max(map(self._pages, spans))
        own = [span.pages[: self._pages(span)] for span in spans]
        begin_R1, computed_R1 = (
            torch.tensor(numbers, device=device)[:, None]
            for numbers in ([span.begin for span in spans], [span.computed for span in spans])
        )
        steps_N = torch.arange(count, device=device)
        pages_RX = torch.tensor([table + [nobody] * (pages - len(table)) for table in own], device=device)
        return Group(begin_R1 + steps_N, computed_R1 + steps_N, pages_RX)

    def _seen_by(self, window: int | None) -> list[torch.Tensor]:
        """Return which positions of its context each token of each group sees, [R, N, C], in a layer of a
        window."""
        if window not in self._seen:
            self._seen[window] = []
            for group in self._groups:
                at_C = torch.arange(group.pages_RX.shape[1] * self._page_size, device=self._slots_T.device)
                own_RN1 = group.positions_RN[..., None]
                seen_RNC = at_C <= own_RN1
                self._seen[window].append(seen_RNC & (at_C > own_RN1 - window) if window else seen_RNC)
        return self._seen[window]


def _attend(
    q_RHND: torch.Tensor, k_RKCD: torch.Tensor, v_RKCE: torch.Tensor, seen_RNC: torch.Tensor, options: Options
) -> torch.Tensor:
    """Return the attention of scaled queries, [R, H, N, E]."""
    if options.softcap is None and options.sink_H is None:
        return F.scaled_dot_product_attention(
            q_RHND, k_RKCD, v_RKCE, attn_mask=seen_RNC[:, None], scale=1.0, enable_gqa=True
        )
    wide = torch.promote_types(q_RHND.dtype, torch.float32)
    q_RKGND = q_RHND.unflatten(1, (k_RKCD.shape[1], -1))
    scores_RKGNC = (q_RKGND @ k_RKCD[:, :, None].transpose(-2, -1)).to(wide)
    if options.softcap is not None:
        scores_RKGNC = options.softcap * torch.tanh(scores_RKGNC / options.softcap)
    scores_RKGNC = scores_RKGNC.masked_fill(~seen_RNC[:, None, None], -torch.inf)
    if options.sink_H is not None:  # a score that takes its share of the weight and has no value
        sink_KG11 = options.sink_H.to(wide).view(*q_RKGND.shape[1:3], 1, 1)
        sink_RKGN1 = sink_KG11.expand(*scores_RKGNC.shape[:-1], 1)
        scores_RKGNC = torch.cat([scores_RKGNC, sink_RKGN1], -1)
    weights_RKGNC = scores_RKGNC.softmax(-1)[..., : seen_RNC.shape[-1]].to(q_RHND.dtype)
    return (weights_RKGNC @ v_RKCE[:, :, None]).flatten(1, 2)
