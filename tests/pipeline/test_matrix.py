# SPDX-License-Identifier: MIT
"""Recorded, replayed, compared with the trainer's whole state after every iteration, over what users run.

Each case is drawn so that together they hold every value of every dimension, the slow ones with every protocol; the
nightly ones cross version, protocol, ranks, channels, queue pairs and MTU far more widely.
"""

import random

import pytest

from tests.pipeline.recordings import check, recorded, shadowed

pytestmark = pytest.mark.dpdk

PROTOCOLS = ("ll", "ll128", "simple")
#: A version of each generation of layouts, and the ends of the long ones.
VERSIONS = ("2.12", "2.17", "2.18", "2.19", "2.20", "2.21", "2.22", "2.23", "2.25", "2.26", "2.28", "2.29", "2.30")
RANKS = (2, 3, 4, 8)
CHANNELS = (1, 2, 4)
QUEUE_PAIRS = ((1, None), (2, True), (4, True), (8, True), (2, False), (4, False), (8, False))
MTUS = (256, 1024, 2048, 4096)
NETWORKS = ({"ip": 4}, {"ip": 6}, {"ip": 4, "vlan": 12}, {"ip": 6, "vlan": 4094})
DTYPES = ("float32", "bfloat16", "float16", "float64")
OPTIMIZERS = (("sgd", False), ("adamw", False), ("adamw", True))


def case(protocol, number, rng):
    """Return options: every dimension steps through its values, each with another stride."""
    version = VERSIONS[number % len(VERSIONS)]
    pairs, split = QUEUE_PAIRS[(number * 3 + PROTOCOLS.index(protocol)) % len(QUEUE_PAIRS)]
    if version in ("2.12", "2.17") and split is False:
        split = None
    optimizer, fused = OPTIMIZERS[number % len(OPTIMIZERS)]
    return {
        "protocol": protocol,
        "nccl": version,
        "ranks": RANKS[number % len(RANKS)],
        "channels": CHANNELS[number // 2 % len(CHANNELS)],
        "pin_channels": bool(number % 2),
        "queue_pairs": pairs,
        "split_queue_pairs": split,
        "mtu": MTUS[(number // 3) % len(MTUS)],
        "dtype": DTYPES[(number // 2) % len(DTYPES)],
        "optimizer": optimizer,
        "fused": fused,
        "adaptive_routing": number % 5 == 4,
        "startup": number % 7 != 6,
        "start_psn": rng.choice([0, 2**24 - rng.randrange(1, 300)]),
        "parameters": rng.choice([3_000, 8_000, 20_000]),
        "bucket_mb": rng.choice([0.005, 0.02, 25.0]),
        "iterations": 3,
        "seed": number,
        **NETWORKS[(number + PROTOCOLS.index(protocol)) % len(NETWORKS)],
    }


ALL = [(place, number) for place in range(len(PROTOCOLS)) for number in range(13 * 12)]
#: A version each, with the protocols in turn.
DEFAULT = [at for at in ALL if at[1] < len(VERSIONS) and at[1] % len(PROTOCOLS) == at[0]]
SLOW = [at for at in ALL if at[1] < len(VERSIONS) and at not in DEFAULT]
NIGHTLY = [at for at in ALL if at not in DEFAULT + SLOW]


def cases(chosen):
    return [case(PROTOCOLS[place], number, random.Random(number)) for place, number in chosen]


def name(options):
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("options", cases(DEFAULT), ids=name)
def test_every_state_is_the_trainers(tmp_path, options):
    out = tmp_path / "out"
    folder = recorded(tmp_path / "recording", **options)
    check(folder, out, shadowed(folder, out))


@pytest.mark.slow
@pytest.mark.parametrize("options", cases(SLOW), ids=name)
def test_every_state_is_the_trainers_with_every_protocol(tmp_path, options):
    test_every_state_is_the_trainers(tmp_path, options)


@pytest.mark.nightly
@pytest.mark.parametrize("options", cases(NIGHTLY), ids=name)
def test_every_state_is_the_trainers_widely(tmp_path, options):
    test_every_state_is_the_trainers(tmp_path, options)


@pytest.mark.nightly
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ten_million_parameters(tmp_path, protocol):
    out = tmp_path / "out"
    folder = recorded(
        tmp_path / "recording", protocol=protocol, nccl="2.24", ranks=2, channels=4, mtu=4096, parameters=10_500_000,
        iterations=3, optimizer="adamw", fused=True, bucket_mb=4.0,
    )  # fmt: skip
    check(folder, out, shadowed(folder, out))
