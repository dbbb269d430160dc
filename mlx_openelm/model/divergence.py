"""KL divergence of a model's next-token distribution from a teacher's, in chunks.

As in `likelihood`, the float32 logits of only one chunk of positions exist at a time.
Letters:

    M  positions      m  positions of a chunk      D  width of the hidden states
    V  rows of the output head                     K  tokens that are stored of each
                                                      position of the teacher
"""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_openelm.model.chunk_sizes import training_logit_rows
from mlx_openelm.model.chunked_losses import chunked_losses

_TINY = 1e-30


class TeacherTargets(Protocol):
    """The teacher's distributions at M positions."""

    def compare(self, part: slice, log_q: mx.array) -> tuple[mx.array, mx.array]:
        """Return KL(teacher || q) in nats, (m,), and the gradient's target, (m, V).

        The gradient of the divergence by the logits of q is q less this target.

        Args:
            part: the positions of the chunk.
            log_q: the student's log-probabilities (m, V).
        """


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """The whole distributions, computed from the teacher's hidden states.

    Attributes:
        rows: normalised hidden states of the teacher (M, its width).
        head: the teacher's output head; has no more rows than the student's.
        temperature: divides the logits.
    """

    rows: mx.array
    head: mx.array
    temperature: float = 1.0

    def compare(self, part: slice, log_q: mx.array) -> tuple[mx.array, mx.array]:
        log_p = log_probabilities(self.rows[part], self.head, self.temperature)
        p, known = mx.exp(log_p), self.head.shape[0]
        divergence = (p * (log_p - log_q[:, :known])).sum(axis=-1)
        return divergence, mx.pad(p, [(0, 0), (0, log_q.shape[1] - known)])


@dataclass(frozen=True, slots=True)
class TopTargets:
    """The K most likely tokens of each position; all others count as one event.

    The divergence over these K + 1 events is a lower bound of the whole divergence (the
    data processing inequality), and equal to it if the student divides the remaining
    probability among the other tokens as the teacher does.

    Attributes:
        tokens: ids (M, K), all different.
        log_probs: their log-probabilities (M, K) under the teacher.
    """

    tokens: mx.array
    log_probs: mx.array

    def compare(self, part: slice, log_q: mx.array) -> tuple[mx.array, mx.array]:
        tokens, log_p = self.tokens[part], self.log_probs[part].astype(mx.float32)
        p = mx.exp(log_p)
        rest = mx.maximum(1 - p.sum(axis=-1, keepdims=True), 0.0)  # (m, 1)
        others = mx.put_along_axis(mx.exp(log_q), tokens, mx.zeros_like(p), axis=-1)
        student_rest = mx.maximum(others.sum(axis=-1, keepdims=True), _TINY)
        known = p * (log_p - mx.take_along_axis(log_q, tokens, axis=-1))
        unknown = rest * (mx.log(mx.maximum(rest, _TINY)) - mx.log(student_rest))
        target = mx.put_along_axis(others * (rest / student_rest), tokens, p, axis=-1)
        return known.sum(axis=-1) + unknown[:, 0], target


def divergences(
    rows: mx.array,
    head: mx.array,
    teacher: TeacherTargets,
    *,
    temperature: float = 1.0,
    gradient: bool = True,
) -> mx.array:
    """Return KL(teacher || student) at each position, float32 (M,), differentiable.

    Args:
        rows: normalised hidden states of the student (M, D).
        head: the student's output head (V, D).
        teacher: its distributions at the same temperature.
        temperature: divides the student's logits.
        gradient: whether the gradient is needed.
    """
    rows, head = rows.astype(mx.float32), head.astype(mx.float32)

    def compare(
        part: slice, hidden: mx.array, head: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the divergences (m,), and the gradient by the logits (m, V)."""
        log_q = log_probabilities(hidden, head, temperature)
        divergence, target = teacher.compare(part, log_q)
        return divergence, (mx.exp(log_q) - target) / temperature

    def forward(part: slice, hidden: mx.array, head: mx.array) -> tuple[mx.array, ...]:
        divergence, by_logits = compare(part, hidden, head)
        return (divergence, by_logits @ head) if gradient else (divergence,)

    def head_gradient(
        part: slice, hidden: mx.array, head: mx.array, weights: mx.array
    ) -> mx.array:
        _, by_logits = compare(part, hidden, head)
        return (weights[:, None] * by_logits).T @ hidden

    chunk = training_logit_rows(head.shape[0])
    return chunked_losses(rows, head, chunk, forward, head_gradient)


def log_probabilities(
    rows: mx.array, head: mx.array, temperature: float = 1.0
) -> mx.array:
    """Return log softmax(rows head^T / temperature), float32 (M, V)."""
    logits = rows.astype(mx.float32) @ head.T.astype(mx.float32)
    logits = logits * (1 / temperature)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def top_log_probabilities(
    rows: mx.array, head: mx.array, count: int, temperature: float = 1.0
) -> tuple[mx.array, mx.array]:
    """Return the `count` most likely tokens of each position, and their logarithms."""
    tokens, log_probs = list[mx.array](), list[mx.array]()
    chunk = training_logit_rows(head.shape[0])
    for start in range(0, rows.shape[0], chunk):
        log_p = log_probabilities(rows[start : start + chunk], head, temperature)
        best = mx.argpartition(-log_p, count - 1, axis=-1)[:, :count]
        tokens.append(best)
        log_probs.append(mx.take_along_axis(log_p, best, axis=-1))
        mx.eval(tokens[-1], log_probs[-1])
    return mx.concatenate(tokens), mx.concatenate(log_probs)
