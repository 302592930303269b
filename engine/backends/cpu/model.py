"""A model built like Llama on a CPU in float32: its weights in the order in which they are read, and its
steps.

The weights are copies with the constants folded in: the norms' scales and the softmax scale. Whether a model
really computes this is found by comparing logits, not by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from engine.backends.cpu.attention import QUERIES, SPAN, Heads
from engine.backends.cpu.forward import BLOCK, PHASES, Panels, Plan, Shape, Space, Weights, step
from engine.backends.cpu.gemm import NARROW, WIDE
from engine.backends.cpu.threads import team
from engine.backends.zeros import zeros
from engine.models import positions
from engine.models.attention_trace import Options
from engine.models.decoder_spec import ACTIVATIONS
from engine.step import Span

LEVELS = 127  # of an int8 weight, on either side of 0


class CompiledDecoder:
    """Runs steps of a model whose layers are lean.

    Args:
        model: it is not changed, and its embedding is shared.
        options: of each layer's attention, as the model's own code passes them.
        page_size: positions of a page of keys and values; `hold` makes room for some.
    """

    def __init__(self, model: PreTrainedModel, options: Sequence[Options], page_size: int) -> None:
        base: Any = model.base_model
        layers, first = list(base.layers), base.layers[0]
        attention, mlp = first.self_attn, first.mlp
        size, scale = attention.head_dim, options[0].scale
        heads, kv_heads = (part.out_features // size for part in (attention.q_proj, attention.k_proj))
        normed = hasattr(attention, "q_norm")
        self._rotary, self._most, self._angles_2PE = (
            base.rotary_emb,
            positions(model.config)[0],
            _room(2, 0, size // 2),
        )
        self.vocabulary = model.get_output_embeddings().out_features
        query_scale = 1.0 if normed else scale  # else it goes into the norm of the queries

        def qkv(layer: Any) -> list[torch.Tensor]:
            q, k, v = (getattr(layer.self_attn, f"{x}_proj") for x in "qkv")
            return [torch.cat([q.weight * query_scale, k.weight, v.weight]) * layer.input_layernorm.weight]

        def qkv_bias(layer: Any) -> torch.Tensor | None:
            q, k, v = (getattr(layer.self_attn, f"{x}_proj").bias for x in "qkv")
            return None if q is None else torch.cat([q * query_scale, k, v])

        def gate_up(layer: Any) -> list[torch.Tensor]:
            return [
                part.weight * layer.post_attention_layernorm.weight
                for part in (layer.mlp.gate_proj, layer.mlp.up_proj)
            ]

        def gate_up_bias(layer: Any) -> torch.Tensor | None:
            if layer.mlp.gate_proj.bias is None:
                return None
            return torch.stack(
                [_blocks(part.bias) for part in (layer.mlp.gate_proj, layer.mlp.up_proj)], 1
            ).flatten()

        def head_norm(layer: Any) -> torch.Tensor | None:
            if not normed:
                return None
            q_D, k_D = layer.self_attn.q_norm.weight * scale, layer.self_attn.k_norm.weight
            return torch.cat([q_D.expand(heads, -1), k_D.expand(kv_heads, -1)])

        self.weights = Weights(
            embedding_VM=base.embed_tokens.weight.detach().numpy(),
            qkv=_panels(layers, qkv),
            out=_panels(layers, lambda layer: [layer.self_attn.o_proj.weight]),
            gate_up=_panels(layers, gate_up),
            down=_panels(layers, lambda layer: [layer.mlp.down_proj.weight]),
            head=_panels([model], lambda model: [model.get_output_embeddings().weight * base.norm.weight]),
            qkv_bias_LN=_rows(layers, qkv_bias),
            out_bias_LM=_rows(layers, lambda layer: layer.self_attn.o_proj.bias),
            gate_up_bias_LN=_rows(layers, gate_up_bias),
            down_bias_LM=_rows(layers, lambda layer: layer.mlp.down_proj.bias),
            head_bias_LV=_rows([model], lambda model: model.get_output_embeddings().bias),
            head_norm_LQD=np.stack([_array(head_norm(layer), (0, size)) for layer in layers]),
        )
        self.shape = Shape(
            len(layers), attention.q_proj.in_features, heads, kv_heads, size, mlp.gate_proj.out_features,
            page_size, ACTIVATIONS[type(mlp.act_fn).__name__] == "gelu_tanh",
            first.input_layernorm.variance_epsilon, first.post_attention_layernorm.variance_epsilon,
            base.norm.variance_epsilon, attention.q_norm.variance_epsilon if normed else 0.0,
        )  # fmt: skip
        self._windows_L = np.array([option.window or 0 for option in options])
        self._page_size = page_size
        self.use(torch.get_num_threads())

    def use(self, threads: int) -> None:
        """Divide steps among so many threads."""
        self._team, size = team(threads), self.shape.head_dim
        rows = max(QUERIES, self.shape.heads // self.shape.kv_heads)
        self._heads = Heads(
            queries_SRD=_room(threads, rows, size),
            scores_SRP=_room(threads, rows, max(SPAN // self._filled_page, 1) * self._filled_page),
            mixed_SRD=_room(threads, rows, size),
            peaks_SR=_room(threads, rows),
            totals_SR=_room(threads, rows),
        )

    @property
    def _filled_page(self) -> int:
        return -(-self._page_size // NARROW) * NARROW

    @property
    def copied_bytes(self) -> int:
        """Bytes of the weights of products, which the model holds too."""
        products = [part for part in self.weights if isinstance(part, Panels)]
        return sum(part.numbers.nbytes + part.scales_LCW.nbytes for part in products)

    def quantize(self) -> None:
        """Turn the weights of products into int8: one scale an output, to nearest, symmetric."""
        # one after the other, so that no more is held twice
        for name in ("qkv", "out", "gate_up", "down", "head"):
            rounded: dict[str, Any] = {name: _rounded(getattr(self.weights, name))}
            self.weights = self.weights._replace(**rounded)

    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages, all of them zero."""
        shape = self.shape.layers, pages + 1, self.shape.kv_heads
        like, blocks = torch.empty(0), self.shape.head_dim // NARROW
        self.keys_LXKDP = zeros((*shape, self.shape.head_dim, self._filled_page), like).numpy()
        self.values_LXKBPV = zeros((*shape, blocks, self._filled_page, NARROW), like).numpy()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.keys_LXKDP[:, 0].nbytes + self.values_LXKBPV[:, 0].nbytes

    def clear(self, pages: list[int]) -> None:
        """Make pages zero again."""
        self.keys_LXKDP[:, pages], self.values_LXKBPV[:, pages] = 0, 0

    def logits(
        self, tokens: list[int], pieces: list[Span], rows: list[int], position_ids: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [R, V] of the tokens at `rows`, rising, of a step of these pieces.

        `position_ids` are what the tokens are rotated by instead of their places in their requests.
        """
        shape, count = self.shape, len(tokens)
        if position_ids is None:
            spans = [np.arange(piece.computed, piece.computed + piece.end - piece.begin) for piece in pieces]
            angles_2TE = self._rope_angles(np.concatenate(spans))
        else:
            angles_2TE = self._angles(torch.tensor(position_ids))
        plan = Plan(
            ids_T=np.array(tokens, np.int64),
            begin_J=np.array([*(piece.begin for piece in pieces), count], np.int64),
            computed_J=np.array([piece.computed for piece in pieces], np.int64),
            table_J=np.cumsum([0, *(len(piece.pages) for piece in pieces)], dtype=np.int64),
            pages=np.concatenate([np.asarray(piece.pages, np.int64) for piece in pieces]),
            cos_TE=angles_2TE[0],
            sin_TE=angles_2TE[1],
            wanted_R=np.array(rows, np.int64),
            windows_L=self._windows_L,
        )
        size, start, logits_RV = (
            self._team.size,
            self._team.start,
            torch.empty(len(rows), _filled(self.vocabulary)),
        )
        space = Space(
            x_TM=_room(count, _filled(shape.width)),
            qkv_TN=_room(count, _filled((shape.heads + 2 * shape.kv_heads) * shape.head_dim)),
            mixed_TN=_room(count, _filled(shape.heads * shape.head_dim)),
            inner_TF=_room(count, _filled(shape.inner)),
            logits_RV=logits_RV.numpy(),
            counts=np.zeros(16 + PHASES * shape.layers, np.int64),
            norms_ST=_room(size, BLOCK),
            both_S2TW=_room(size, 2, BLOCK, WIDE),
            heads=self._heads,
        )
        keys, values = self.keys_LXKDP, self.values_LXKBPV
        self._team.run(lambda i: step(i, size, start, self.weights, shape, plan, keys, values, space))
        return logits_RV[:, : self.vocabulary]

    def _rope_angles(self, positions_T: np.ndarray) -> np.ndarray:
        """Cosines and sines of half the dimensions, [2, T, E]; the other half's are the same."""
        needed = int(positions_T.max()) + 1
        if needed > self._angles_2PE.shape[1]:
            more = torch.arange(max(needed, min(2 * needed, self._most)))
            self._angles_2PE = self._angles(more)
        return self._angles_2PE.take(positions_T, axis=1)  # in C's order: another would be compiled for

    def _angles(self, positions_T: torch.Tensor) -> np.ndarray:
        """As the model's own module computes them, [2, T, E]."""
        both = self._rotary(torch.empty(0), positions_T[None])
        return torch.cat(both)[..., : self.shape.head_dim // 2].contiguous().numpy()


def _room(*sizes: int) -> np.ndarray:
    return np.empty(sizes, np.float32)


def _filled(size: int) -> int:
    """The next multiple of a panel."""
    return -(-size // WIDE) * WIDE


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> [C, W, ...], the last block filled up with zeros."""
    filled = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, _filled(len(rows)) - len(rows)))
    return filled.unflatten(0, (-1, WIDE))


def _rounded(panels: Panels) -> Panels:
    numbers = torch.from_numpy(panels.numbers)
    scales_LCW = (numbers.abs().amax(2) / LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded = torch.empty(numbers.shape, dtype=torch.int8)
    for layer, scales_CW in enumerate(scales_LCW):
        rounded[layer] = (numbers[layer] / scales_CW[:, None]).round_()
    return Panels(rounded.numpy(), scales_LCW.numpy())


def _panels(layers: Sequence[Any], weights: Callable[[Any], list[torch.Tensor]]) -> Panels:
    """Weights [N, M] of each layer as panels [L, C, M, W]; those of several products of a layer take
    turns."""
    panels = None
    for index, layer in enumerate(layers):
        blocks_CSWM = torch.stack([_blocks(weight.detach()) for weight in weights(layer)], 1)
        blocks_CMW = blocks_CSWM.flatten(0, 1).transpose(1, 2)
        if panels is None:
            panels = torch.empty(len(layers), *blocks_CMW.shape)
        panels[index].copy_(blocks_CMW)
    assert panels is not None
    return Panels(panels.numpy(), _room(len(layers), 0, WIDE))


def _rows(layers: Sequence[Any], vector: Callable[[Any], torch.Tensor | None]) -> np.ndarray:
    """One vector a layer, filled up to whole panels; of no columns where there are none."""
    return np.stack(
        [_array(None if (x := vector(layer)) is None else _blocks(x).flatten(), (0,)) for layer in layers]
    )


def _array(x: torch.Tensor | None, empty: tuple[int, ...]) -> np.ndarray:
    return np.empty(empty, np.float32) if x is None else x.detach().contiguous().numpy()
