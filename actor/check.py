"""What an actor can check before a start: tokenizer, workflow, task, reward and tools. Nothing is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actor.chat.check_model import check_model
from actor.chat.tokenizer import Tokenizer
from actor.extensions import Extensions, make_extensions, make_task
from actor.tasks.task import Split, Task
from actor.tools.tool import Services
from protocol.check_result import CheckResult, attempt
from protocol.config import Config
from protocol.errors import ConfigError, DataError, UserError
from protocol.extensions import described
from protocol.types import Question

_QUESTION_CHARS = 80


def check_actor(config: Config) -> Iterator[CheckResult]:
    """Yields one result for each check; a check whose input has failed is left out."""
    try:
        tokenizer = Tokenizer.load(config.model.path)
    except UserError as error:
        yield CheckResult("fail", "tokenizer", str(error))
        tokenizer = None
    if tokenizer is not None:
        yield CheckResult("ok", "tokenizer", f"{tokenizer.num_ids} ids, end token {tokenizer.eos_token}")
        yield _context_tokens(config, tokenizer)
    try:
        extensions = make_extensions(config, split="train", services=_services(config))
    except UserError as error:
        yield CheckResult("fail", "extensions", str(error))
        yield from _eval_questions(config)
        return
    names = f"workflow {config.workflow.use}, task {config.task.use}, reward {config.reward.use}"
    yield CheckResult("ok", "extensions", f"{names}, tools {', '.join(extensions.tools) or 'none'}")
    yield from _unused_tools(config, extensions)
    try:
        question = first_question(extensions.task, split="train")
    except UserError as error:
        yield CheckResult("fail", "task", str(error))
    else:
        yield _task(config, extensions.task, question)
        if tokenizer is not None:
            yield attempt("prompt", lambda: _prompt(config, extensions, tokenizer, question))
    yield from _eval_questions(config)


def first_question(task: Task, *, split: Split) -> Question:
    """Raises: DataError if the task cannot make a question; it has the problem of the user's code."""
    try:
        return task.question(0)
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"task: question(0) of the split {split} raised {described(error)}") from error


def _context_tokens(config: Config, tokenizer: Tokenizer) -> CheckResult:
    def check() -> str:
        tokens = config.workflow.context_tokens
        check_model(config.model.path, tokenizer=tokenizer, context_tokens=tokens)
        return f"{tokens}, within the model's positions"

    return attempt("context_tokens", check)


def _services(config: Config) -> Services:
    return Services(searcher=_NoSearch() if config.retriever.indexes or config.retriever.port else None)


class _NoSearch:
    """Replaces the retriever's client: every search raises."""

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list]:
        raise RuntimeError("extensions must not search before they are started")


def _unused_tools(config: Config, extensions: Extensions) -> Iterator[CheckResult]:
    if unused := [tool.lookup_name for tool in config.tool if tool.lookup_name not in extensions.tools]:
        yield CheckResult(
            "warn",
            "tool",
            f"{', '.join(unused)}: the workflow {config.workflow.use} does not use it; name it in workflow.tools, or "
            "remove it",
        )
    if config.retriever.indexes and not extensions.tools:
        yield CheckResult("warn", "retriever", "the run has indexes, but the workflow has no tool that can search them")


def _task(config: Config, task: Task, question: Question) -> CheckResult:
    count, batch = task.num_questions, config.learner.groups_per_batch
    text = f"first question: {' '.join(question.text.split()):.{_QUESTION_CHARS}}"
    if count is not None and count < batch:
        return CheckResult(
            "warn",
            "task",
            f"{count} questions for batches of {batch} groups (learner.groups_per_batch): a batch repeats questions; "
            f"{text}",
        )
    return CheckResult("ok", "task", f"{'unlimited' if count is None else count} questions; {text}")


def _prompt(config: Config, extensions: Extensions, tokenizer: Tokenizer, question: Question) -> str:
    """Raises: UserError."""
    extensions.workflow.check(tokenizer)
    try:
        prompt = extensions.workflow.first_prompt(question)
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"workflow: first_prompt raised {described(error)}") from error
    if not prompt:
        return "the workflow accepts the tokenizer"
    length, limit = len(tokenizer.encode(prompt)), config.workflow.context_tokens
    if length >= limit:
        raise ConfigError(
            f"the prompt of the first question has {length} tokens, but workflow.context_tokens is {limit}: raise it, "
            "or shorten the tools' descriptions"
        )
    return f"the prompt of the first question has {length} tokens of {limit}"


def _eval_questions(config: Config) -> Iterator[CheckResult]:
    try:
        task = make_task(config, split="eval")
        first_question(task, split="eval")
    except UserError as error:
        yield CheckResult("warn", "eval questions", f"`palimpsest eval` cannot run: {error}")
    else:
        count = "unlimited" if task.num_questions is None else task.num_questions
        yield CheckResult("ok", "eval questions", str(count))
