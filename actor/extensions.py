"""Creates an actor's extensions: the workflow, task, reward and tools that the run file names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actor.rewards.reward import Reward
from actor.tasks.task import Split, Task
from actor.tools.tool import Services, Tool
from actor.workflows.workflow import Workflow
from protocol.config import Config, ToolConfig
from protocol.errors import ConfigError
from protocol.extensions import ExtensionPoint

WORKFLOWS = ExtensionPoint(
    key="workflow",
    noun="workflow",
    builtins={"memsearcher": "actor.workflows.memsearcher:MemSearcher"},
    methods={"run": "async def run(self, question, session) -> Episode"},
)
TASKS = ExtensionPoint(
    key="task",
    noun="task",
    builtins={"qa": "actor.tasks.qa:QuestionAnswering", "toy": "actor.tasks.toy.task:ToyTask"},
    methods={"question": "def question(self, cursor) -> Question"},
)
REWARDS = ExtensionPoint(
    key="reward",
    noun="reward",
    builtins={
        "em": "actor.rewards.reward:ExactMatchReward",
        "f1": "actor.rewards.reward:F1Reward",
        "memsearcher": "actor.rewards.reward:MemSearcherReward",
    },
    methods={"score": "async def score(self, question, episode, trajectory) -> Score"},
)
TOOLS = ExtensionPoint(
    key="tool",
    noun="tool",
    builtins={"search": "actor.tools.search:SearchTool"},
    methods={"call": "async def call(self, arguments, context) -> Observation"},
)


@dataclass(frozen=True, slots=True)
class Extensions:
    """An actor's extensions, created but not started."""

    workflow: Workflow
    task: Task
    reward: Reward
    tools: Mapping[str, Tool]


def make_task(config: Config, *, split: Split) -> Task:
    """Creates the run's task. Raises: UserError."""
    return TASKS.create(config.task, base_dir=config.run.base_dir, split=split, seed=config.run.seed)


def make_extensions(config: Config, *, split: Split, services: Services) -> Extensions:
    """Imports and creates the run's workflow, task, reward and tools. Raises: UserError (one sentence)."""
    base_dir = config.run.base_dir
    tools = _make_tools(config, services)
    return Extensions(
        workflow=WORKFLOWS.create(
            config.workflow, base_dir=base_dir, tools=tools, context_tokens=config.workflow.context_tokens
        ),
        task=make_task(config, split=split),
        reward=REWARDS.create(config.reward, base_dir=base_dir),
        tools=tools,
    )


def _make_tools(config: Config, services: Services) -> dict[str, Tool]:
    """Creates the workflow's tools, by name. A built-in tool without a `[[tool]]` section has default options."""
    workflow = WORKFLOWS.load(config.workflow.use)
    sections = {tool.lookup_name: (f"tool[{i}]", tool) for i, tool in enumerate(config.tool)}
    names = config.workflow.tools
    if names is None:
        names = getattr(workflow, "tool_names", ())
    tools = {}
    for name in names:
        if name not in sections and name not in TOOLS.builtins:
            raise ConfigError(
                f"workflow {config.workflow.use} needs the tool {name!r}, but no [[tool]] has this name; tools of the "
                f"run: {', '.join(sections) or 'none'}; built-in: {', '.join(TOOLS.builtins)}"
            )
        key, section = sections.get(name, ("tool", ToolConfig(use=name)))
        tools[name] = TOOLS.create(section, base_dir=config.run.base_dir, key=key, services=services)
    return tools
