"""Flags of the compiler by chip: each with its source, in a line that a shell understands."""

import json
import os
import subprocess
import sys

import pytest

from ddt_jax import cli
from ddt_jax.scaling import xla_flags
from ddt_jax.scaling.chips import CHIPS


def test_every_chip_has_flags_once_each_and_each_group_a_source():
    assert set(xla_flags.FLAGS) == set(CHIPS)
    for chip, groups in xla_flags.FLAGS.items():
        names = [flag.partition("=")[0] for flag in xla_flags.of(chip)]
        assert len(names) == len(set(names)) and all(name.startswith("--xla_") for name in names)
        assert all(group.why and group.source for group in groups)


@pytest.mark.parametrize(("chip", "name"), [("v5p", "LIBTPU_INIT_ARGS"), ("h100", "XLA_FLAGS")])
def test_a_shell_sets_them_before_what_is_set_already(chip, name, capsys, tmp_path):
    for arguments in ([], ["--explain"]):
        assert cli.main(["flags", "--chip", chip, *arguments, "--json", str(tmp_path / "r.json")]) == 0
        script = f'{capsys.readouterr().out}\nprintf "%s" "${name}"'
        env = {"PATH": os.environ["PATH"], name: "--mine=1"}
        found = subprocess.run(["bash", "-euc", script], env=env, capture_output=True, text=True, check=True).stdout
        assert found.split() == [*xla_flags.of(chip), "--mine=1"]
        assert json.loads((tmp_path / "r.json").read_text()) == {"variable": name, "flags": xla_flags.of(chip)}


def test_a_chip_without_flags_is_one_line(capsys):
    assert cli.main(["flags", "--chip", "v0"]) == cli.EXIT_USER
    assert "--chip v0: no flags are known for it; choose from v5e, v5p" in capsys.readouterr().err


@pytest.mark.slow
def test_the_compiler_takes_all_flags_of_a_gpu():
    """Of any platform: a flag that it does not know ends the process."""

    def run(flags):
        env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        return subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True
        ).returncode

    assert run(xla_flags.of("h100")) == 0
    assert run(["--xla_gpu_enable_nothing_of_the_kind=true"]) != 0
