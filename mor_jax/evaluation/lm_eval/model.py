"""A run as a model of lm-evaluation-harness; importing this registers it as `mor_jax`.

lm_eval.simple_evaluate(model="mor_jax", model_args={"path": "runs/mor"}, tasks=["piqa"])
lm_eval.simple_evaluate(model=MorLM("runs/mor"), tasks=["piqa"])
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mor_jax.config.parsing import check, check_positive, parse
from mor_jax.evaluation.lm_eval import generation
from mor_jax.evaluation.lm_eval.encoding import Encoding
from mor_jax.evaluation.lm_eval.scoring import Pair, Scorer
from mor_jax.inference.chat_template import ChatTemplate
from mor_jax.inference.config import compute_config
from mor_jax.inference.load_model import LoadedModel, load_model
from mor_jax.models.param_count import unique_parameters

_log = logging.getLogger("lm_eval.mor_jax")

Answer = tuple[float, bool]

_DOUBLE_PREFIX = (
    "%d of %d documents begin with %r, which is scored after another %r and adds many nats, as in "
    "lm-eval's hf model. Omit it with --model_args add_bos_token=False"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """`--model_args` besides `path`. None: as in the run.

    step: checkpoint. calibration: name or file of a calibration. recursions: number to run instead
    of the trained one. dtype: to compute in. max_length: maximum sequence length. max_gen_toks:
    tokens to generate if a task does not set them. add_bos_token: whether to prepend the
    beginning-of-text token. prefix_token_id: token that stands for an empty context.
    """

    step: int | None = None
    calibration: str | None = None
    recursions: int | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    max_length: int | None = None
    max_gen_toks: int = 256
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None

    def validate(self, longest: int, vocab_size: int) -> None:
        """Raises `ValueError` unless they fit a model of this context length and vocabulary."""
        check_positive("model_args", self, "max_gen_toks")
        number, rule = self.max_length, f"must be in 2 .. {longest}, the model's context"
        ok = number is None or 2 <= number <= longest
        check(ok, "model_args.max_length", number, rule, "Leave it out to use all of it")
        token, rule = self.prefix_token_id, f"must be in 0 .. {vocab_size - 1}"
        ok = token is None or 0 <= token < vocab_size
        check(ok, "model_args.prefix_token_id", token, rule, "Leave it out")


@register_model("mor_jax", "mor-jax")
class MorLM(TemplateLM):
    """Scores and generates under causal routing, however the routers were trained.

    Tokens, contexts and truncation are those of lm-eval's `hf` model on the run's export. Results
    depend on the batch size by rounding only (docs/evaluation.md has the bound). Raises
    `ValueError` as `load_model`.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """batch_size: sequences; None or `auto`: up to 16,384 tokens. device: ignored, JAX chooses.
        settings: as in `ModelArgs`."""
        super().__init__()
        asked = parse(ModelArgs, settings, "model_args.")
        self.batch_size = rows_of(batch_size, max_batch_size)
        self.served = _served(path, asked)
        self.settings, self._path = asked, path
        cfg = self.served.cfg
        asked.validate(cfg.max_seq_len, cfg.vocab_size)
        self.max_length = asked.max_length or cfg.max_seq_len
        tokenizer = self.served.tokenizer
        self.encoding = Encoding(tokenizer, asked.add_bos_token, asked.prefix_token_id)
        given = (self.served.params, self.served.thresholds)
        self._scorer = Scorer(cfg, *given, self.max_length, self.batch_size)
        self._chat: ChatTemplate | None = None
        self.truncated = 0
        self._seed = 1234

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.encoding.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.encoding.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Name for caches: depends on the tokenizer's contents, not on its path."""
        return self.served.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """As `Encoding.encode`."""
        return self.encoding.encode(string, add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Log-likelihood of each continuation after its context, and whether it is greedy.

        Raises `ValueError` for a continuation without tokens, or longer than the maximum length.
        """
        for context, continuation in (request.args for request in requests):
            if context == "":
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                # A text that begins with the prefix has it as its context.
                ok = len(tokens) > (tokens[:1] == [self.prefix_token_id])
                self._check_scored(ok, continuation)
        return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        # Trailing spaces of a context move to the continuation, which can leave the context empty.
        return before or [self.prefix_token_id], after

    @staticmethod
    def _check_scored(ok: bool, continuation: str) -> None:
        check(ok, "continuation", continuation[:60], "is empty: nothing to score", "Fix the task")

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in nats; long texts in windows, each token scored once."""
        pairs: list[Pair] = []
        owners: list[int] = []
        double = 0
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            double += tokens[:1] == [self.prefix_token_id]
            windows = get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            )
            pairs += map(make_disjoint_window, windows)
            owners += [number] * (len(pairs) - len(owners))
        if double:
            _log.warning(
                _DOUBLE_PREFIX,
                double,
                len(requests),
                *[self.encoding.decode([self.prefix_token_id])] * 2,
            )
        found = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scored(pairs, disable_tqdm), strict=True):
            found[owner] += value
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated texts up to a stop text; contexts that are too long are truncated on the left.

        Raises `ValueError` for a setting of generation that the engine does not have.
        """
        if not requests:
            return []
        settings = [
            generation.generation_request(
                request.args[1], self.settings.max_gen_toks, self.max_length
            )
            for request in requests
        ]
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        limits = [self.max_length - one.max_tokens for one in settings]
        self._count(
            sum(len(c) > limit for c, limit in zip(contexts, limits, strict=True)), contexts
        )
        truncated = [
            context[-limit:] or [self.prefix_token_id]
            for context, limit in zip(contexts, limits, strict=True)
        ]
        asked = generation.requests(truncated, settings, self._seed)
        # A repeated request is sampled with other seeds.
        self._seed += len(asked)
        found: list[str] = []
        with tqdm(total=len(asked), disable=disable_tqdm, desc="Generating") as bar:
            for text in generation.answers(self.served, asked, self.batch_size, bar.update):
                self.cache_hook.add_partial("generate_until", requests[len(found)].args, text)
                found.append(text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as a prompt; omits a system message that the template does not support."""
        self._chat = self._chat or ChatTemplate(self.served)
        try:
            return self._rendered(self._chat, chat_history, add_generation_prompt)
        except ValueError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            _log.warning("the chat template does not support a system message; it is omitted")
            return self._rendered(self._chat, rest, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the template. Raises `ValueError` for a name, or if there is none."""
        if not chat_template:
            return None
        rule = "the model has one template, without a name"
        ok = chat_template is True
        check(ok, "apply_chat_template", chat_template, rule, "Leave the name out")
        self._chat = self._chat or ChatTemplate(self.served)
        return self.served.chat_template

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for the results."""
        cfg = self.served.cfg
        return {
            "model_num_parameters": unique_parameters(cfg),
            "model_dtype": cfg.dtype,
            "model_revision": self.served.name,
            "model_sha": "",
            "routing": "none" if cfg.router.kind == "none" else f"{cfg.router.kind}, causal",
            "recursions": cfg.num_recursions,
            "truncated_contexts": self.truncated,
        }

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Answer]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        for texts, _, continuation in requests:
            number, what = len(continuation), texts[1][:60]
            rule = f"has {number} tokens, the model supports at most {self.max_length}"
            fix = "Leave the document out with --samples, or use a model with a longer context"
            check(number <= self.max_length, "continuation", what, rule, fix)
            self._check_scored(number > 0, what)
        return self._scored(pairs, disable_tqdm, [texts for texts, *_ in requests])

    def _scored(
        self, pairs: Sequence[Pair], quiet: bool, names: Sequence[tuple[str, str]] | None = None
    ) -> list[Answer]:
        """names: of the requests, for the cache."""
        limit = self.max_length + 1
        self._count(sum(len(a) + len(b) > limit for a, b in pairs), pairs)
        found: dict[int, Answer] = {}
        with tqdm(total=len(pairs), disable=quiet, desc="Scoring") as bar:
            for number, answer in self._scorer.scores(pairs):
                found[number] = answer
                if names is not None:
                    self.cache_hook.add_partial("loglikelihood", names[number], answer)
                bar.update()
        return [found[number] for number in range(len(pairs))]

    def _count(self, number: int, of: Sequence[Any]) -> None:
        self.truncated += number
        if number:
            message = (
                "%d of %d contexts exceed the maximum length (%d tokens), truncated on the left"
            )
            _log.warning(message, number, len(of), self.max_length)

    def _rendered(self, chat: ChatTemplate, messages: list[dict[str, str]], generates: bool) -> str:
        if generates:
            return chat.render(messages)
        # The last message is continued: what the template appends to it is removed.
        text = chat.render(messages, add_generation_prompt=False)
        last = messages[-1]["content"].strip()
        end = text.rfind(last) + len(last)
        rule = "the chat template does not repeat the last message as it is"
        check(bool(last) and last in text, "messages", last[:60], rule, "Leave gen_prefix out")
        return text[:end]


def rows_of(batch_size: int | str | None, most: int | None = None) -> int | None:
    """Batch size, None for automatic. Raises `ValueError` unless positive or `auto`."""
    if batch_size is None or str(batch_size).partition(":")[0] == "auto":
        return most
    rule = "must be a positive number or 'auto'"
    ok = str(batch_size).isdecimal() and int(batch_size) > 0
    check(ok, "batch_size", batch_size, rule, "Try auto")
    return int(batch_size)


def _served(path: str, asked: ModelArgs) -> LoadedModel:
    given: Mapping[str, Any] = {
        name: getattr(asked, name) for name in ("step", "calibration", "recursions")
    }
    served = load_model(path, **given)
    return dataclasses.replace(served, cfg=compute_config(served.cfg, asked.dtype))


__all__ = ["ModelArgs", "MorLM", "rows_of"]
