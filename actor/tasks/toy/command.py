"""`prepare-toy`: writes the input files of a run on the toy: tokenizer, demonstrations, one corpus per world."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("prepare-toy")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to.")
@click.option(
    "--world", "worlds", type=click.IntRange(min=0), multiple=True, required=True, help="A training world's seed."
)
@click.option("--eval-world", "eval_worlds", type=click.IntRange(min=0), multiple=True, help="An unseen world's seed.")
@click.option("--episodes", type=click.IntRange(min=1), default=4000, show_default=True, help="Demonstrations.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(out: Path, worlds: tuple[int, ...], eval_worlds: tuple[int, ...], episodes: int, seed: int) -> None:
    """Write tokenizer/, demonstrations.safetensors and corpora/world-SEED.jsonl under --out.

    Demonstrations use questions of the training worlds only.
    """
    from actor.chat.tokenizer import Tokenizer
    from actor.tasks.toy.demonstrations import write_demonstrations
    from actor.tasks.toy.task import write_corpus
    from actor.tasks.toy.tokenizer import write_tokenizer
    from actor.tasks.toy.world import make_world
    from protocol.role_startup import end_with_launcher

    end_with_launcher()
    for world in map(make_world, (*worlds, *eval_worlds)):
        write_corpus(out / "corpora" / f"{world.collection}.jsonl", world)
    write_tokenizer(out / "tokenizer")
    share = write_demonstrations(
        out / "demonstrations.safetensors",
        worlds,
        tokenizer=Tokenizer.load(out / "tokenizer"),
        num_episodes=episodes,
        seed=seed,
    )
    click.echo(f"{episodes} demonstrations, {share:.0%} answered correctly, in {out}")


if __name__ == "__main__":
    main()
