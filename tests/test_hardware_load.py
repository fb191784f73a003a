"""The catalog of machines and the strict reader of hardware files."""

import functools
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from moesim.artifacts import catalog_folder
from moesim.errors import InputError
from moesim.hardware.load import hardware_names, load_hardware
from moesim.hardware.spec import HardwareSpec

GOOD = """\
schema: moesim.hardware/1
name: toy
description: two GPUs
references:
  sheet: a data sheet
  guess: "assumption: a guess"
ranks: gpu
devices:
  gpu:
    count: 2
    max_count: 4
    kind: gpu
    memory: hbm
    flops_per_s: {bf16: 64e9}
    kernel_overhead_s: 5e-6
    tile_tokens: 16
    reference: sheet
    reference_of: {kernel_overhead_s: guess}
  cpu: {count: 1, kind: cpu, memory: dram, flops_per_s: {fp32: 1e9}, kernel_overhead_s: 0, tile_tokens: 1,
        reference: sheet}
memories:
  hbm: {per: gpu, kind: hbm, num_bytes: 8e9, bytes_per_s: 1e12, reference: sheet}
  dram: {per: node, kind: dram, num_bytes: 64e9, bytes_per_s: 1e11, reference: sheet}
links:
  pcie: {per: gpu, kind: pcie, source: dram, target: hbm, bytes_per_s: 1e10, latency_s: 1e-5, duplex: full,
         port: host, reference: sheet}
node_fabric: {name: nvlink, kind: nvlink, bytes_per_s: 4e10, latency_s: 1e-5, ranks_per_port: 1,
              contention: port, reference: sheet}
"""


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file with one piece of the good text replaced."""

    def _write(old: str = "", new: str = "") -> Path:
        assert old in GOOD
        path = tmp_path / "toy.yaml"
        path.write_text(GOOD.replace(old, new, 1) if old else GOOD, encoding="utf-8")
        return path

    return _write


@functools.cache
def raw(name: str) -> dict:
    """Return a catalog file by another reader than the one under test."""
    return YAML(typ="safe", pure=True).load(catalog_folder("hardware") / f"{name}.yaml")


@functools.cache
def node(name: str) -> HardwareSpec:
    """Return one node of a catalog machine, read once (a HardwareSpec is not changed by its readers)."""
    return load_hardware(name)


@pytest.mark.parametrize("name", hardware_names())
def test_catalog_loads(name):
    """Every catalog machine loads, is named as its file, and every part's reference is listed."""
    hardware = node(name)
    assert hardware.name == name
    parts = [
        *hardware.devices.values(),
        *hardware.memories.values(),
        *hardware.links.values(),
        *hardware.fabrics,
    ]
    assert all(len(hardware.references[part.reference]) > 20 for part in parts)
    assert hardware.num_ranks == hardware.ranks_per_node == raw(name)["devices"][raw(name)["ranks"]]["count"]


@pytest.mark.parametrize("name", hardware_names())
def test_catalog_references_are_used(name):
    """Every listed reference is cited by some part, so that none outlives its number."""
    file = raw(name)
    parts = [*file["devices"].values(), *file["memories"].values(), *file["links"].values()]
    parts += [file[key] for key in ("node_fabric", "cluster_fabric") if key in file]
    cited = {part["reference"] for part in parts}.union(*(part.get("reference_of", {}).values() for part in parts))
    assert cited == set(file["references"])


@pytest.mark.parametrize("name", [name for name in hardware_names() if "cluster_fabric" in raw(name)])
def test_catalog_clusters(name):
    """A cluster has every part of a node once per node, ranks in node order, and nodes that no link joins."""
    num_nodes = 2 + len(name) % 3
    one, many = node(name), load_hardware(name, num_nodes=num_nodes)
    for kind in ("devices", "memories", "links", "ranks"):
        assert len(getattr(many, kind)) == num_nodes * len(getattr(one, kind))
    assert many.num_nodes == num_nodes
    assert [many.device(rank).node for rank in many.ranks] == [many.node_of_rank(r) for r in range(many.num_ranks)]
    assert all(many.memories[link.source].node == many.memories[link.target].node for link in many.links.values())
    assert many.fabric("cluster") == one.fabric("cluster")


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("h100-sxm", "hbm", 3.35e12),
        ("h200-sxm", "hbm", 4.8e12),
        ("a100-sxm", "hbm", 2.039e12),
        # pins x Gb/s per pin / 8
        ("rtx-3090", "gddr", 384 * 19.5e9 / 8),
        ("rtx-4090", "gddr", 384 * 21e9 / 8),
        ("l40s", "gddr", 384 * 18e9 / 8),
        # channels x transfers per second x bytes per transfer
        ("h100-sxm", "dram", 16 * 4800e6 * 8),
        ("a100-sxm", "dram", 16 * 3200e6 * 8),
        ("l40s", "dram", 24 * 4800e6 * 8),
        ("rtx-4090", "dram", 2 * 5200e6 * 8),
        ("rtx-3090", "dram", 2 * 3200e6 * 8),
        ("cpu-server", "dram", 12 * 4800e6 * 8),
        ("jetson-agx-orin", "unified", 256 / 8 * 6400e6),
        ("phone-soc", "unified", 64 / 8 * 9600e6),
        ("raspberry-pi-5", "unified", 32 / 8 * 4267e6),
    ],
)
def test_memory_rates_follow_from_the_bus(name, key, expected):
    """A memory's rate is what the width and the clock of its bus give."""
    assert raw(name)["memories"][key]["bytes_per_s"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "lanes", "transfers_per_s", "encoding"),
    [
        ("h100-sxm", 16, 32e9, 128 / 130),
        ("a100-sxm", 16, 16e9, 128 / 130),
        ("rtx-4090", 16, 16e9, 128 / 130),
        ("rtx-3090", 16, 16e9, 128 / 130),
        ("l40s", 16, 16e9, 128 / 130),
    ],
)
def test_pcie_rates_follow_from_the_lanes(name, lanes, transfers_per_s, encoding):
    """A PCIe link's rate per direction is lanes x transfers x encoding."""
    link = node(name).links["node0.gpu0.pcie"]
    assert link.bytes_per_s == pytest.approx(lanes * transfers_per_s * encoding / 8, rel=2e-3)
    assert link.duplex == "full"


@pytest.mark.parametrize(
    ("name", "cores", "hertz", "fp32_per_cycle"),
    [
        ("h100-sxm", 112, 2.0e9, 64),
        ("a100-sxm", 128, 2.25e9, 32),
        ("rtx-4090", 16, 4.5e9, 32),
        ("rtx-3090", 16, 3.4e9, 32),
        ("l40s", 64, 3.25e9, 32),
        ("cpu-server", 96, 2.4e9, 32),
        ("jetson-agx-orin", 12, 2.2e9, 16),
        ("raspberry-pi-5", 4, 2.4e9, 16),
    ],
)
def test_cpu_peaks_follow_from_the_cores(name, cores, hertz, fp32_per_cycle):
    """A CPU's fp32 peak is cores x clock x flops per cycle."""
    assert node(name).device("node0.cpu0").flops_per_s["fp32"] == pytest.approx(
        cores * hertz * fp32_per_cycle, rel=5e-3
    )


def test_a_large_cluster():
    """A catalog machine grows to hundreds of ranks and can be used with fewer GPUs per node."""
    hardware = load_hardware("h100-sxm", num_nodes=36, gpus_per_node=4)
    assert (hardware.num_ranks, hardware.num_nodes, hardware.ranks[-1]) == (144, 36, "node35.gpu3")


def test_expanded_names(write):
    """Parts of a group are named node.device.part, shared ones node.part, and a port is the node's."""
    hardware = load_hardware(write(), gpus_per_node=3)
    assert hardware.ranks == ("node0.gpu0", "node0.gpu1", "node0.gpu2")
    assert list(hardware.memories) == [*(f"node0.gpu{i}.hbm" for i in range(3)), "node0.dram"]
    link = hardware.links["node0.gpu2.pcie"]
    assert (link.source, link.target, link.port) == ("node0.dram", "node0.gpu2.hbm", "node0.host")
    assert hardware.memory_of("node0.cpu0").name == "node0.dram"


def test_reference_of_one_key(write):
    """A number with a reference of its own keeps it in the part's joined reference."""
    hardware = load_hardware(write())
    device = hardware.device("node0.gpu0")
    assert hardware.references[device.reference] == "a data sheet; kernel_overhead_s: assumption: a guess"
    assert hardware.device("node0.cpu0").reference == "sheet"


def test_yaml_12_numbers(write):
    """64e9 and 5e-6 are numbers, which YAML 1.1 readers take for text."""
    device = load_hardware(write()).device("node0.gpu0")
    assert (device.flops_per_s["bf16"], device.kernel_overhead_s) == (64_000_000_000, 0.000005)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # a misspelt key, at its line and column
        (
            "    memory: hbm",
            "    memroy: hbm",
            r"toy\.yaml:13:5: devices\.gpu: unknown key 'memroy'\. Did you mean 'memory'\?",
        ),
        (
            "schema: moesim.hardware/1\n",
            "schema: moesim.hardware/1\nnode: 1\n",
            r":2:1: unknown key 'node'\.",
        ),
        # a missing key, at its mapping
        ("    kind: gpu\n", "", r":10:5: devices\.gpu: missing key 'kind'"),
        ("ranks: gpu\n", "", r":1:1: missing key 'ranks'"),
        # a repeated key
        ("    kind: gpu\n", "    kind: gpu\n    kind: npu\n", r":13:5: found duplicate key \"kind\""),
        # wrong types: a text, a truth value, a fraction, an infinity, an empty mapping, nothing
        ("5e-6", "fast", r":15:5: devices\.gpu: 'kernel_overhead_s' must be a number, got 'fast'"),
        ("count: 2", "count: true", r"'count' must be a whole number, got True"),
        ("count: 2", "count: 1.5", r"'count' must be a whole number, got 1\.5"),
        ("64e9}", ".inf}", r"devices\.gpu\.flops_per_s: 'bf16' must be a number, got inf"),
        ("{bf16: 64e9}", "{}", r"'flops_per_s' must be a mapping with at least one key"),
        ("description: two GPUs", "description:", r":3:1: 'description' must be text, got None"),
        # ends that do not exist
        (
            "source: dram",
            "source: dramm",
            r":25:\d+: links\.pcie: source: no memory 'dramm'\. Did you mean 'dram'\?",
        ),
        (
            "memory: hbm",
            "memory: hbn",
            r":13:5: devices\.gpu: memory: no memory 'hbn'\. Did you mean 'hbm'\?",
        ),
        (
            "{per: gpu, kind: hbm",
            "{per: gpus, kind: hbm",
            r":22:\d+: memories\.hbm: no device group 'gpus'\. Did you mean 'gpu'\?",
        ),
        ("ranks: gpu", "ranks: gup", r":7:1: no device group 'gup'\. Did you mean 'gpu'\?"),
        # references
        (
            "    reference: sheet",
            "    reference: sheets",
            r":17:5: devices\.gpu: reference 'sheets' is not listed\. Did you mean 'sheet'\?",
        ),
        (
            "{kernel_overhead_s: guess}",
            "{kernel_s: guess}",
            r":18:\d+: devices\.gpu\.reference_of: unknown key 'kernel_s'",
        ),
        # values that HardwareSpec refuses
        ("64e9}", "-1}", r"flops_per_s\[bf16\] must be positive"),
        ("contention: port", "contention: prot", r"contention 'prot'\. Did you mean 'port'\?"),
        ("count: 2", "count: 0", r"count must be at least 1, got 0"),
        # not YAML, and another schema
        ("devices:", "devices: [", r"toy\.yaml:\d+:\d+: "),
        (
            "moesim.hardware/1",
            "moesim.trace/1",
            r":1:1: expected schema 'moesim\.hardware/1', found 'moesim\.trace/1'",
        ),
    ],
)
def test_bad_files(write, old, new, message):
    """A wrong file is refused with its line, column, key and what was expected."""
    with pytest.raises(InputError, match=message):
        load_hardware(write(old, new))


@pytest.mark.parametrize(
    "content", [b"", b"- 1\n", b"\x80\x04K\x01.", b"a: \xff\xfe\n", b"!!python/object/apply:os.getcwd []\n"]
)
def test_no_mapping_no_text(tmp_path, content):
    """An empty file, a list, a pickle, bytes that are not text and a foreign tag are refused, never run."""
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        load_hardware(path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("h100-smx", {}, "unknown hardware 'h100-smx'. Did you mean 'h100-sxm'?"),
        ("./none.yaml", {}, "no such file"),
        ("h100-sxm", {"num_nodes": 0}, "num_nodes must be at least 1, got 0"),
        ("h100-sxm", {"gpus_per_node": 9}, "gpus_per_node must be 1 to 8, got 9"),
        ("h100-sxm", {"gpus_per_node": 0}, "gpus_per_node must be 1 to 8, got 0"),
        ("cpu-server", {"gpus_per_node": 1}, "no device here is of kind 'gpu'"),
        ("phone-soc", {"num_nodes": 2}, "2 nodes need a 'cluster_fabric', and the file has none"),
    ],
)
def test_bad_sizes(name, options, message):
    """A machine or a size that the catalog does not have is refused with the way out."""
    with pytest.raises(InputError) as caught:
        load_hardware(name, **options)
    assert message in str(caught.value)
