"""Rows of data sets as tokens to learn from, and what was left out of them, by reason."""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data.conversations import Conversation, NoConversation, conversation_of
from deepseek_jax.data.filters import Dropped
from deepseek_jax.data.prompts import PromptBatches, batches, check_agreed
from deepseek_jax.data.sources import open_source
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.text.turns import MaskedTokens, chat_tokens, text_tokens

_MOST_REASONS = 20
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclass(frozen=True, kw_only=True)
class ConversationConfig:
    """What to learn from.

    Args:
        data: files (.jsonl, .jsonl.gz, .json, .csv, .parquet), folders or patterns of such, or hub data sets
            (owner/name:config), with a conversation in every row; see `data.conversations`.
        columns: of `data`: the messages, or the prompt and the completion. Without it the usual names are found.
        chat: put conversations into the model's chat template. Without it a prompt and its completion are plain text.
        thinking: the template's switch of that name (DeepSeek-V3.1, V3.2); None leaves it to the template.
        max_length: tokens a row may have; None is the model's context, at most 32,768 (DeepSeek-R1).
        truncate: cut rows that are longer; else they are left out.
    """

    data: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    chat: bool = True
    thinking: bool | None = None
    max_length: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        if len(self.columns) > 2:
            raise ValueError(f"columns: got {len(self.columns)}, wanted one of messages, or a prompt's and an answer's")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length: got {self.max_length}, wanted at least 2 tokens")
        if self.thinking is not None and not self.chat:
            raise ValueError("thinking: got it without a chat template, whose switch it is; leave one of the two out")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that no row could be written with.

        Raises:
            ValueError: it has no chat template, or for plain text no token that ends one.
        """
        if self.chat and tokenizer.chat_template is None and tokenizer.chat_encoding is None:
            raise ValueError(
                "chat: got a tokenizer without a chat_template, wanted one in chat_template.jinja or "
                "tokenizer_config.json; add the instruct model's, or learn plain prompts and completions with --no-chat"
            )
        if not self.chat and tokenizer.eos is None:
            raise ValueError("chat: got False and a tokenizer without an eos_token, wanted one to end completions with")

    def tokens(self, tokenizer: Tokenizer, conversation: Conversation) -> MaskedTokens:
        """A conversation as this model is to learn it."""
        if self.chat:
            switches = {} if self.thinking is None else {"thinking": self.thinking}
            kept = {"history": conversation.history, "unlearnt": conversation.unlearnt}
            return chat_tokens(tokenizer, conversation.messages, **kept, **switches)
        if conversation.as_texts is None:
            raise NoConversation("more than a prompt and its completion, which want a chat template")
        return text_tokens(tokenizer, *conversation.as_texts)


class Counts(NamedTuple):
    """Of rows: tokens, and those that are learnt."""

    rows: int
    tokens: int
    learnt: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {self.learnt:,} of them learnt"


class MaskedRows(Sequence[MaskedTokens]):
    """Token rows in a nameless temporary file; `open_rows` makes it.

    Attributes:
        lengths: tokens of each row.
        report: what was left out, by source and reason.
        notes: what else there is to say, in lines.
    """

    def __init__(self, stored: np.ndarray, starts: np.ndarray, lengths: np.ndarray, report=(), notes=()):
        # a token's id and, in the last bit, whether it is learnt
        self._stored, self._starts, self.lengths = stored, starts, lengths
        self.report: tuple[Dropped, ...] = tuple(report)
        self.notes: tuple[str, ...] = tuple(notes)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> MaskedTokens:
        index = range(len(self))[index]
        start = self._starts[index]
        row = np.array(self._stored[start : start + self.lengths[index]])
        return MaskedTokens(row >> 1, (row & 1).astype(bool))

    def counts(self) -> Counts:
        learnt = sum(int(self[index].mask.sum()) for index in range(len(self)))
        return Counts(len(self), int(self.lengths.sum()), learnt)

    def split(self, count: int, *, seed: int) -> tuple["MaskedRows", "MaskedRows"]:
        """A random choice of `count` rows, to evaluate on, and the others, both in their order."""
        chosen = np.zeros(len(self), bool)
        chosen[np.random.default_rng(seed).permutation(len(self))[:count]] = True
        of = lambda rows: MaskedRows(self._stored, self._starts[rows], self.lengths[rows], self.report, self.notes)
        return of(chosen), of(~chosen)

    def identity(self) -> list[dict[str, Any]]:
        """What a checkpoint knows the rows by."""
        digest = hashlib.blake2b(digest_size=16)
        for start, length in zip(self._starts, self.lengths, strict=True):
            digest.update(int(length).to_bytes(8, "little") + self._stored[start : start + length].tobytes())
        found = digest.hexdigest()
        return [{"name": "data", "rows": len(self), "digest": found, "kept": len(self), "choice": found, "columns": []}]


def row_batches(rows: MaskedRows, *, size: int, seed: int) -> PromptBatches:
    """Endless lists of `size` rows, every epoch in another order; a checkpoint's position in other rows is refused.

    Raises:
        ValueError: fewer rows than a batch takes.
    """
    return PromptBatches(batches(rows, size=size, seed=seed), {"size": size, "seed": seed}, rows.identity())


def open_rows(
    config: ConversationConfig, tokenizer: Tokenizer, *, names: Sequence[str] = (), max_length: int
) -> MaskedRows:
    """Reads, renders and encodes all rows once.

    In several processes all call it alike; they refuse to start when their rows differ.

    Args:
        config: what to learn from.
        tokenizer: of the model.
        names: of sources, in place of the configuration's.
        max_length: tokens a row may have.

    Raises:
        ValueError: a source that cannot be read, or no row left.
    """
    config.check_tokenizer(tokenizer)
    read = _Reading(config, tokenizer, max_length)
    for name in names or config.data:
        source = open_source(name)
        for number in range(len(source)):
            read.row(source[number], source.where(number))
        read.finish(source.name, len(source))
    rows = read.rows()
    check_agreed(rows.identity())
    return rows


def rows_of(config: ConversationConfig, tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> MaskedRows:
    """The rows of conversations that were made and not read."""
    read = _Reading(config, tokenizer, 2**31)
    for number, conversation in enumerate(conversations):
        read.add(config.tokens(tokenizer, conversation), f"conversation {number}")
    return read.rows()


class _Reading:
    def __init__(self, config: ConversationConfig, tokenizer: Tokenizer, max_length: int):
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.file = tempfile.TemporaryFile()
        self.lengths: list[int] = []
        self.report: list[Dropped] = []
        self.left: dict[str, list[str]] = {}  # by kind of reason: the first one and its place, then places
        self.noted: dict[str, int] = {}

    def row(self, row: dict[str, Any], where: str) -> None:
        try:
            found = self.config.tokens(self.tokenizer, conversation_of(row, self.config.columns))
        except ValueError as problem:
            self.leave_out(str(problem), where)
            return
        if len(found.tokens) > self.max_length:
            if not self.config.truncate:
                self.leave_out(f"more than {self.max_length} tokens", where)
                return
            self.note(f"rows cut to their first {self.max_length} tokens, as --truncate asks")
            found = found._replace(tokens=found.tokens[: self.max_length], mask=found.mask[: self.max_length])
        self.add(found, where)

    def add(self, found: MaskedTokens, where: str) -> None:
        if not found.mask.any():
            self.leave_out("no token to learn among those that fit", where)
            return
        self.file.write((found.tokens << 1 | found.mask).astype(np.int32).tobytes())
        self.lengths.append(len(found.tokens))
        last = int(found.tokens[np.flatnonzero(found.mask)[-1]])
        if last not in self.tokenizer.eos_ids:
            self.note("rows whose last learnt token does not end generation: sampling will not stop there")
        if found.continued:
            self.note(
                "rows whose last thoughts the chat template drops: they stand behind the opening of an answer instead"
            )
        if found.unlearnt:
            self.note(
                "assistant turns that are read and not learnt: the chat template drops their thoughts or text",
                found.unlearnt,
            )
        if found.missing:
            self.note(
                "texts of users or systems that the chat template leaves out: answers are learnt without them",
                found.missing,
            )

    def note(self, text: str, count: int = 1) -> None:
        self.noted[text] = self.noted.get(text, 0) + count

    def leave_out(self, reason: str, where: str) -> None:
        kind = _VARYING.sub("", reason)[:100]
        if kind not in self.left and len(self.left) >= _MOST_REASONS:
            kind, reason = "other", "other reasons"
        self.left.setdefault(kind, [f"{reason[:300]} (the first: {where})"]).append(where)

    def finish(self, name: str, rows: int) -> None:
        by_count = sorted(self.left.values(), key=len, reverse=True)
        self.report += [Dropped(name, first, len(places), rows) for first, *places in by_count]
        self.left = {}

    def rows(self) -> MaskedRows:
        if not self.lengths:
            told = "; ".join(str(dropped) for dropped in self.report[:3])
            raise ValueError(f"no row left to learn from: {told or 'there is no data'}")
        self.file.flush()
        stored = np.memmap(self.file, np.int32, mode="r")
        lengths = np.array(self.lengths, np.int64)
        notes = [f"{count:,} {text}" for text, count in self.noted.items()]
        return MaskedRows(stored, np.cumsum(lengths) - lengths, lengths, self.report, notes)
