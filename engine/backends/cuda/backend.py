"""Batches whose tokens stay on the device, so that the next is launched before the host has read this one's.

A token that the device has chosen and the host has not seen is *pending*: the next batch's input names it by
where it lies, and everything else that a batch needs (positions, pages, who runs) the host knows without it.
All of it but the capture of graphs also runs on a CPU, in Triton's interpreter.

T tokens of the batch, B rows of one token (they come first), K tokens whose logits are wanted, V vocabulary,
L layers, X pages, P positions of a page.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from engine.backends import Backend
from engine.backends.cuda import kernels
from engine.backends.cuda.batch_layout import BatchShape, bucket, lay_out, upload
from engine.backends.cuda.block_tables import BlockTables
from engine.backends.cuda.graphs import CudaGraphs
from engine.backends.cuda.in_flight import InFlight
from engine.backends.cuda.model import Chunks, CudaDecoder, StepInputs
from engine.models.decoder_spec import DecoderSpec
from engine.request import Request
from engine.sampling import sample
from engine.step import Batch, Choice, Done, Ticket


class CudaBackend(Backend):
    """Runs a decoder that `can_run`, by Triton kernels over pages and CUDA graphs.

    Args:
        spec: what the model computes. Weights of products that read the same become views of one.
        rows: requests that share a batch, at most.
        deterministic: take products of a fixed size, and attend every token as a row of its own, cut by its
            own length alone: bitwise the same logits in any company.
    """

    def __init__(self, spec: DecoderSpec, page_size: int, rows: int, deterministic: bool = False) -> None:
        self.decoder = CudaDecoder(spec, deterministic)
        self._spec, self._page_size, self._rows, self._one_by_one = spec, page_size, rows, deterministic
        self._device = spec.embedding_VM.device
        # Triton launches where torch's current device is.
        self._here = torch.cuda.device(self._device if self._device.type == "cuda" else -1)
        # The tokens that the batch before has chosen, and whose they are.
        self._last_B = torch.zeros(bucket(rows), dtype=torch.int64, device=self._device)
        self._pending: dict[Hashable, int] = {}
        # Logits of a batch that is not greedy, for one graph at a time.
        self._sampled_KV = spec.embedding_VM.new_empty(len(self._last_B), len(spec.head.weight_NM))

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that could not become views of joined ones."""
        return self.decoder.copied_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self._kv_L2XKPD[:, :, 0].nbytes

    def allocate_kv(self, pages: int) -> None:
        """Make room for the keys and values of so many pages; graphs of earlier ones are forgotten."""
        spec, size = self._spec, self._page_size
        shape = len(spec.layers), 2, pages, spec.kv_heads, size, spec.head_dim
        self._kv_L2XKPD = spec.embedding_VM.new_zeros(shape)
        columns = min(pages, -(-spec.positions // size))
        self._most = columns * size  # positions of a context
        self._block_tables = BlockTables(self._rows, columns, self._device)
        self.graphs = CudaGraphs(self._compute, self._last_B)

    def clear(self, pages: list[int]) -> None:
        """Do nothing: no kernel reads beyond what a request has written."""

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits [R, V] of a batch's wanted tokens; it may be of other requests than those that are
        launched."""
        with self._here:
            tables = BlockTables(len(batch.spans), self._block_tables.tables_RN.shape[1], self._device)
            layout = lay_out(batch, tables.update(batch.spans), {}, self._tile, self._one_by_one)
            shape, rotate_by_T = layout.shape(greedy=False), None
            if batch.position_ids is not None:
                rotate_by_T = torch.tensor(batch.position_ids, device=self._device)[layout.order_T]
            ints_I = upload(layout.ints(shape), self._device)
            return self._logits(shape, ints_I, tables.tables_RN, rotate_by_T)[layout.wanted]

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Ticket[list[Choice]]:
        """Start a batch.

        Of a request's tokens the last may be pending, chosen by the batch launched just before. Where all
        requests take the likeliest token, nothing is waited for; else the ticket holds tokens that are here
        already.
        """
        with self._here:
            lines_J = self._block_tables.update(batch.spans)
            layout = lay_out(batch, lines_J, self._pending, self._tile, self._one_by_one)
            greedy = all(map(_greedy, batch.requests))
            shape = layout.shape(greedy)
            if layout.is_decode:
                logits_KV = self.graphs.run(shape.padded(self._most), layout)
            else:
                logits_KV = self._compute(shape, upload(layout.ints(shape), self._device))
            self._pending = dict(zip(batch.requests, layout.wanted, strict=True)) if greedy else {}
            if logits_KV is not None:
                return Done(sample(logits_KV[layout.wanted], batch.requests))
            tokens_B = self._last_B.to("cpu", non_blocking=True, copy=True)
            done = torch.cuda.current_stream().record_event() if self._device.type == "cuda" else None
            return InFlight(tokens_B, done, layout.wanted)

    @property
    def _tile(self) -> int:
        """Tokens of a chunk that are attended at a time."""
        itemsize = self._spec.embedding_VM.dtype.itemsize
        return kernels.chunk_tokens(self._spec.heads // self._spec.kv_heads, self._spec.head_dim, itemsize)

    def _compute(self, shape: BatchShape, ints_I: torch.Tensor) -> torch.Tensor | None:
        """Compute a batch; its tokens are in `_last_B` then, or if not greedy, return logits [K, V]."""
        logits_KV = self._logits(shape, ints_I, self._block_tables.tables_RN)
        if not shape.greedy:
            return self._sampled_KV[: shape.kept].copy_(logits_KV)
        if shape.kept:
            self._last_B[: shape.kept] = kernels.best_tokens(logits_KV)
        return None

    def _logits(
        self,
        shape: BatchShape,
        ints_I: torch.Tensor,
        tables_RN: torch.Tensor,
        rotate_by_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [K, V] for a batch that lies in an array on the device.

        `rotate_by_T` are positions instead of the tokens' places in their requests.
        """
        inputs_3T, keep_K, lines_R, (begins_R, ends_R, computed_R), tiles_W2 = shape.parts(ints_I)
        chunks = (
            Chunks(tables_RN[lines_R], begins_R, ends_R, computed_R, tiles_W2) if shape.requests else None
        )
        ids_T, positions_T, slots_T, lengths_T = kernels.step_inputs(
            inputs_3T, self._last_B, tables_RN, self._page_size
        )
        inputs = StepInputs(
            ids_T=ids_T,
            positions_T=positions_T if rotate_by_T is None else rotate_by_T,
            slots_T=slots_T,
            tables_RN=tables_RN,
            lengths_B=lengths_T[: shape.rows],
            lines_B=inputs_3T[2, : shape.rows],
            max_length=shape.bound,
            split=kernels.split_size(1 if self._one_by_one else shape.rows, self._spec.kv_heads),
            rows_are_new=not self._one_by_one,
            chunks=chunks,
            keep_K=None if shape.kept == shape.rows and not shape.tokens else keep_K.long(),
        )
        return self.decoder.logits(inputs, self._kv_L2XKPD)


def _greedy(request: Request) -> bool:
    """Return whether its next token is the likeliest, with nothing else asked for."""
    least = request.params.min_new_tokens if request.stop_ids else 0
    return request.greedy and (
        not least or len(request.tokens) + request.pending - request.prompt_len >= least
    )
