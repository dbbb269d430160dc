"""All prompts of a file are answered.

Each gets a JSON object, in the order of the file; so does every line that is no prompt.
An object's key stands for all that decides its answer: by it, a stopped run knows what
it has answered already.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching import (
    BATCH_SIZE,
    Answered,
    BatchPrompt,
    answer_together,
)
from mlx_openelm.generation.decoding import Token
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.penalties import check_bias
from mlx_openelm.generation.prompt_file import Prompt, Prompts
from mlx_openelm.generation.streaming import check_room, prepare_prompt
from mlx_openelm.model.fingerprint import fingerprint_model
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.ordered_jsonl import (
    Answers,
    JsonObject,
    hash_key,
    open_answers,
)
from mlx_openelm.text.templates import RAW, Turn, encode_turns, render
from mlx_openelm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PromptsReport:
    """What came of a file.

    Attributes:
        prompts: its lines with something in them.
        problems: a sentence for each one that has no answer.
        kept: answers that a stopped run had written.
        tokens: that were drawn now.
    """

    prompts: int
    problems: tuple[str, ...]
    kept: int
    tokens: int


def answer_prompts(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Prompts,
    sampling: Sampling,
    *,
    template: str = "auto",
    system: str = "",
    batch_size: int = BATCH_SIZE,
    output: Path | None = None,
    force: bool = False,
    on_answer: Callable[[JsonObject], None] = lambda answer: None,
    on_problem: Callable[[str], None] = lambda sentence: None,
    on_progress: Callable[[int, int, int], None] = lambda done, prompts, tokens: None,
) -> PromptsReport:
    """Answer prompts, many at a time.

    Args:
        output: where the objects are written, a line each. What a stopped run of the
            same prompts and settings has left there stays, and only the rest is
            answered; so are lines that were no prompts then and have become some.
        force: replace an output of other prompts or settings.
        on_answer: given the objects in order; not those that stood in the output.
        on_problem: told in a sentence of every line that has no answer.
        on_progress: told how many prompts are done, how many there are, and how many
            tokens were drawn, after each step.

    Raises:
        OpenELMError: the settings do not fit the model, the output is something else or
            of another run, or the disk refuses; what is in the output stays.
    """
    job = _Job(model, tokenizer, prompts, sampling, template, system)
    problems: list[str] = []
    tokens = 0

    def encode_prompts(answers: Answers) -> Iterator[BatchPrompt]:
        for place, prompt in enumerate(prompts.prompts):
            if place in answers and place not in job.refused:
                continue
            ids, problem = job.encode(prompt)
            if not problem:
                yield BatchPrompt(prompt.number, ids)
                continue
            problems.append(f"{prompts.name}:{prompt.place}: {problem}")
            on_problem(problems[-1])
            answers.add(place, job.refuse(prompt, problem))

    with open_answers(output, job.find_place, on_answer, force=force) as answers:
        kept = len(answers) - len(job.refused)

        def count(new: int) -> None:
            nonlocal tokens
            tokens += new
            on_progress(len(answers), len(prompts.prompts), tokens)

        for answered in answer_together(
            model,
            tokenizer,
            encode_prompts(answers),
            sampling,
            batch_size=batch_size,
            on_step=count,
        ):
            answers.add(*job.describe(answered))
    return PromptsReport(len(prompts.prompts), tuple(problems), kept, tokens)


class _Job:
    """All that decides what is answered.

    Attributes:
        refused: places of prompts whose problem stood in the output already.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        prompts: Prompts,
        sampling: Sampling,
        template: str,
        system: str,
    ) -> None:
        """Check the settings.

        Raises:
            OpenELMError: no such template, or it has no place for a system text; a
                bias names no token of the model.
        """
        prepare_prompt(tokenizer, "", template=template, system=system)
        check_bias(sampling.logit_bias, model.config.vocab_size)
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._template = (tokenizer.template or RAW) if template == "auto" else template
        self._system = system
        self._prompts = prompts.prompts
        self._places = {prompt.number: i for i, prompt in enumerate(prompts.prompts)}
        self._settings = json.dumps([fingerprint_model(model), asdict(sampling)])
        self.refused: set[int] = set()

    def encode(self, prompt: Prompt) -> tuple[list[int], str]:
        """Return a prompt's ids, or why it has no answer."""
        if prompt.problem:
            return [], prompt.problem
        try:
            ids = self._encode(prompt.content)
            check_room(ids, self._model, self._sampling)
        except OpenELMError as error:
            return [], str(error)
        return ids, ""

    def describe(self, answered: Answered) -> tuple[int, JsonObject]:
        """Return the place of an answer, and its object."""
        place = self._places[answered.prompt.number]
        prompt = self._prompts[place]
        described = {
            **_name(prompt),
            "text": answered.text,
            "tokens": list(answered.tokens),
            "finish_reason": answered.finish_reason,
            "prompt_tokens": len(answered.prompt.ids),
            "generation_tokens": len(answered.drawn),
            "prompt_tps": answered.prompt_tps,
            "generation_tps": answered.generation_tps,
            "time_to_first_token_s": answered.time_to_first_token_s,
            "peak_memory_bytes": answered.peak_memory_bytes,
        }
        if self._sampling.logprobs:
            said = answered.drawn[: len(answered.tokens)]  # EOS is left out
            described["logprobs"] = list(map(self._describe_token, said))
        return place, {**described, "key": self._key(prompt, answered.prompt.ids)}

    def refuse(self, prompt: Prompt, problem: str) -> JsonObject:
        """Return the object of a prompt that has no answer."""
        return {**_name(prompt), "error": problem}

    def find_place(self, answer: JsonObject) -> int | None:
        """Return the place of an object that this job would write, too, but for times.

        There is none for answers to other prompts, or with other settings.
        """
        place = self._places.get(answer["line"])
        if place is None:
            return None
        prompt = self._prompts[place]
        ids, problem = self.encode(prompt)
        if problem:
            if answer != self.refuse(prompt, problem):
                return None
            self.refused.add(place)
            return place
        return place if answer.get("key") == self._key(prompt, ids) else None

    def _encode(self, content: str | tuple[Turn, ...]) -> list[int]:
        if isinstance(content, str):
            return prepare_prompt(
                self._tokenizer, content, template=self._template, system=self._system
            )
        if (
            self._template == RAW
        ):  # it has a place for one turn, or says that it has not
            render([*content, Turn("assistant", "")], RAW)
            return self._tokenizer.encode(content[0].text)
        system = "" if content[0].role == "system" else self._system
        ids, _ = encode_turns(self._tokenizer, content, self._template, system)
        return ids

    def _key(self, prompt: Prompt, ids: Sequence[int]) -> str:
        return hash_key(_name(prompt), list(ids), self._settings)

    def _describe_token(self, token: Token) -> JsonObject:
        """Return a token and what was likely in its place, as JSON has it."""
        top = [self._spell(*alternative) for alternative in token.alternatives]
        return {**self._spell(token.id, token.logprob), "top": top}

    def _spell(self, token: int, logprob: float | None) -> JsonObject:
        piece = self._tokenizer.piece(token)
        return {"token": token, "piece": piece, "logprob": logprob}


def _name(prompt: Prompt) -> JsonObject:
    own = {} if prompt.id is None else {"id": prompt.id}
    return {"line": prompt.number, **own}
