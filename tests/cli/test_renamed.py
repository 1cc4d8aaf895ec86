"""Options by the names that they had in 0.1.0."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from batchinfer.cli.app import cli


@pytest.mark.parametrize(
    ("name", "earlier", "today", "key"),
    [
        ("run", ["--shard", "2/3"], ["--slice", "2/3"], "slice_"),
        ("run", ["--shard=2/3"], ["--slice=2/3"], "slice_"),
        ("plan", ["--calibrate", "8"], ["--measure", "8"], "num_measured"),
    ],
)
def test_an_earlier_name_means_the_same(
    name: str, earlier: list[str], today: list[str], key: str
) -> None:
    command = cli.commands[name]
    values = []
    for arguments in (earlier, today):
        with click.Context(command, info_name=name) as context:
            command.parse_args(context, ["job.yaml", *arguments])
            values.append(context.params[key])
    assert values[0] == values[1] is not None


@pytest.mark.parametrize("arguments", [["--shard", "1/2", "--slice=2/2"], ["--slice", "1/2"] * 2])
def test_both_names_together_are_refused_and_one_name_twice_is_not(arguments: list[str]) -> None:
    with click.Context(cli.commands["run"], info_name="run") as context:
        if "--shard" in arguments:
            with pytest.raises(click.UsageError, match="--shard is the earlier name of --slice"):
                context.command.parse_args(context, ["job.yaml", *arguments])
        else:
            context.command.parse_args(context, ["job.yaml", *arguments])


@pytest.mark.parametrize("name", ["run", "plan"])
def test_help_shows_the_name_of_today_alone(name: str) -> None:
    shown = CliRunner().invoke(cli, [name, "--help"]).output
    assert "--shard" not in shown and "--calibrate" not in shown
    assert "--slice" in shown or "--measure" in shown


def test_another_command_does_not_know_the_option_by_either_name() -> None:
    ended = CliRunner().invoke(cli, ["show", "out", "--shard", "1/2"])
    assert ended.exit_code == 2 and "--shard" in ended.output
