"""KL divergence from a teacher, by blocks of the vocabulary.

Neither output head is unpacked as a whole, and logits exist for one block of tokens at
a time. Letters:

    M  positions      V  tokens      v  tokens of a block      D  width of the rows
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_openelm.model.learned_scales import LearnedScales
from mlx_openelm.model.openelm import OpenELM

BLOCK = 4096  # tokens: at a width of 1280, 21 MB of the head


class Head(Protocol):
    """An output head that is unpacked block by block."""

    @property
    def num_tokens(self) -> int:
        """V."""

    def parts(self) -> list[mx.array]:
        """Return what is trained; each array has V rows."""

    def unpack(self, block: slice, parts: Sequence[mx.array]) -> mx.array:
        """Return a block of the weight, float32 (v, D), from the same rows of parts."""


class PlainHead:
    """The head of a linear layer or an embedding; not trained."""

    def __init__(self, module: nn.Module) -> None:
        self._weight: mx.array = module.weight
        self.num_tokens = self._weight.shape[0]

    def parts(self) -> list[mx.array]:
        return []

    def unpack(self, block: slice, parts: Sequence[mx.array]) -> mx.array:
        return self._weight[block].astype(mx.float32)


def head_of(model: OpenELM) -> Head:
    """Return a model's output head."""
    module = model.head_module
    return module if isinstance(module, LearnedScales) else PlainHead(module)


def hidden_rows(model: OpenELM, tokens: mx.array) -> mx.array:
    """Return the normalised hidden states (N T, D) of token ids (N, T)."""
    hidden: mx.array = model.transformer(tokens)
    return hidden.reshape(-1, hidden.shape[-1])


@dataclass(frozen=True, slots=True)
class Outputs:
    """A model's normalised hidden states (M, D), and its output head."""

    rows: mx.array
    head: Head


@dataclass(frozen=True, slots=True)
class Comparison:
    """A student beside its teacher; all are (M,).

    Attributes:
        divergence: KL(teacher || student) in nats.
        agrees: whether the most likely token is the same.
        log_z, teacher_log_z: logarithm of the sum of exp(logit).
    """

    divergence: mx.array
    agrees: mx.array
    log_z: mx.array
    teacher_log_z: mx.array


def compare(student: Outputs, teacher: Outputs) -> Comparison:
    """Compare the distributions of both at each position."""
    parts, taught_parts = student.head.parts(), teacher.head.parts()
    sums = list[mx.array]()
    for block in _blocks(student.head):
        logits = _logits(student.rows, student.head, block, parts)
        taught = _logits(teacher.rows, teacher.head, block, taught_parts)
        ours, theirs = _sum_up(logits, block), _sum_up(taught, block)
        powers = mx.exp(taught - theirs[0][:, None])
        difference = (powers * (taught - logits)).sum(axis=-1)
        sums.append(mx.stack([*ours, *theirs, difference]))  # (7, M)
    # Largest logits are subtracted first: they are exact, log(Z) is rounded.
    *each, differences = mx.stack(sums, axis=1)  # (blocks, M)
    top, token, total = _join(*each[:3])
    taught_top, taught_token, taught_total = _join(*each[3:])
    shares = mx.exp(each[3] - taught_top) / taught_total
    mean = (shares * differences).sum(axis=0)
    return Comparison(
        mean - (taught_top - top) + mx.log(total / taught_total),
        token == taught_token,
        top + mx.log(total),
        taught_top + mx.log(taught_total),
    )


def _sum_up(logits: mx.array, block: slice) -> tuple[mx.array, mx.array, mx.array]:
    """Return the largest logit, its token and the sum of exp(logit - largest): (M,)."""
    largest = logits.max(axis=-1)
    token = (logits.argmax(axis=-1) + block.start).astype(mx.float32)
    return largest, token, mx.exp(logits - largest[:, None]).sum(axis=-1)


def _join(
    largest: mx.array, token: mx.array, powers: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the same of the whole vocabulary, (M,), from those of blocks."""
    at = largest.argmax(axis=0)[None]
    top, best = (mx.take_along_axis(x, at, axis=0)[0] for x in (largest, token))
    return top, best, (mx.exp(largest - top) * powers).sum(axis=0)


def total_divergence(student: Outputs, teacher: Outputs) -> mx.array:
    """Return the sum over positions of KL(teacher || student), differentiable.

    The gradient is computed with the sum.
    """
    head, given = student.head, student.head.parts()

    @mx.custom_function
    def compute(rows: mx.array, *parts: mx.array) -> tuple[mx.array, ...]:
        outputs = Outputs(rows, head)
        compared = compare(outputs, teacher)
        by_rows, by_parts = mx.zeros_like(rows), [list[mx.array]() for _ in parts]
        done = [compared.divergence]
        for block in _blocks(head):  # one after another
            hidden, taught_rows = mx.depends([rows, teacher.rows], done)
            p = mx.exp(
                _logits(taught_rows, teacher.head, block, teacher.head.parts())
                - compared.teacher_log_z[:, None]
            )

            def unpack(*parts: mx.array, block: slice = block) -> mx.array:
                return head.unpack(block, parts)

            ours = [part[block] for part in parts]
            weight = unpack(*ours)
            q = mx.exp(hidden @ weight.T - compared.log_z[:, None])
            by_logits = q - p  # (M, v)
            by_rows = by_rows + by_logits @ weight
            done = [by_rows]
            if parts:
                _, gradients = mx.vjp(unpack, ours, [by_logits.T @ hidden])
                done += gradients
                for all_of, gradient in zip(by_parts, gradients, strict=True):
                    all_of.append(gradient)
        joined = [mx.concatenate(of_part) for of_part in by_parts]
        return compared.divergence.sum(), by_rows, *joined

    @compute.vjp
    def compute_vjp(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        return tuple(cotangents[0] * gradient for gradient in outputs[1:])

    total: mx.array = compute(student.rows.astype(mx.float32), *given)[0]  # type: ignore[index] # untyped
    return total


def _blocks(head: Head) -> Iterator[slice]:
    for start in range(0, head.num_tokens, BLOCK):
        yield slice(start, min(start + BLOCK, head.num_tokens))


def _logits(
    rows: mx.array, head: Head, block: slice, parts: Sequence[mx.array]
) -> mx.array:
    weight = head.unpack(block, [part[block] for part in parts])
    return rows.astype(mx.float32) @ weight.T
