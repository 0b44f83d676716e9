"""Training over two hosts: two network namespaces that see each other through one cable."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.train.world import command, environment, only_run, train, train_lines, validation_losses, write_recipe

ADDRESSES = ("10.77.13.1", "10.77.13.2")
SETTINGS = {"batch_size_train": 2, "global_batch_size": 8, "valid_splits": ["val"], "max_new_tokens": 2}


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """(namespace, interface, address) of each host."""
    if not shutil.which("ip"):
        pytest.skip("network namespaces need iproute2")
    names = [f"lavis-{i}-{os.getpid()}" for i in (0, 1)]
    cables = [f"lv{i}-{os.getpid()}" for i in (0, 1)]  # at most 15 characters
    try:
        made = [ip("netns", "add", name) for name in names] + [
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        ]
        if failed := next((m for m in made if m.returncode), None):
            pytest.skip(f"no network namespaces here: {failed.stderr.strip()}")
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            for words in (
                ["link", "set", cable, "netns", name],
                ["-n", name, "addr", "add", f"{address}/24", "dev", cable],
                ["-n", name, "link", "set", cable, "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ):
                done = ip(*words)
                assert done.returncode == 0, (words, done.stderr)
        yield list(zip(names, cables, ADDRESSES, strict=True))
    finally:
        ip("link", "del", cables[0])
        for name in names:
            ip("netns", "del", name)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="data-parallel"),
        pytest.param(["parallel.strategy=pipeline", "parallel.num_stages=2"], id="pipeline", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("deepspeed_operators")
def test_two_hosts_train_as_one_with_two_ranks(cache, tmp_path, hosts, options):
    expected = train(cache, tmp_path / "one", *options, ranks=2, run=SETTINGS)
    folder = tmp_path / "two"
    folder.mkdir()
    _, *script = command(write_recipe(folder, run=SETTINGS), *options)
    meeting = [
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={ADDRESSES[0]}:29517",
        "--rdzv_id=two",
        "--nnodes=2",
        "--nproc_per_node=1",
    ]
    started = []
    for i, (namespace, cable, address) in enumerate(hosts):
        # torchrun knows the meeting point's host by its name, and these two have the same
        here = f"--rdzv_conf=is_host={1 - i}"
        launcher = [
            "ip",
            "netns",
            "exec",
            namespace,
            sys.executable,
            "-m",
            "torch.distributed.run",
            *meeting,
            here,
            f"--local_addr={address}",
        ]
        log = (folder / f"{namespace}.log").open("w")
        started.append(
            subprocess.Popen(
                [*launcher, *script],
                cwd=folder,
                env=environment(cache) | {"GLOO_SOCKET_IFNAME": cable},
                stdout=log,
                stderr=log,
                text=True,
            )
        )
    for process, (namespace, *_) in zip(started, hosts, strict=True):
        assert process.wait(timeout=240) == 0, (folder / f"{namespace}.log").read_text()[-3000:]
    run = only_run(folder)
    assert [r["loss"] for r in train_lines(run)] == pytest.approx([r["loss"] for r in train_lines(expected)], rel=1e-6)
    assert validation_losses(run) == pytest.approx(validation_losses(expected), rel=1e-6)
