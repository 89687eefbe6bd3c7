"""Topology, and the command mooncake-ep topo, on the machines of tests/data/topology."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mooncake_ep as ep
from test_cli import refuse, succeed

_FILTER = "MOONCAKE_EP_DEVICE_FILTER"
_NIC = "nic mlx5_0 active ethernet pci0000:2a/0000:2b:00.0 numa 0"
_DATA = Path(__file__).parent.parent / "data" / "topology"


def unpack(name: str, folder: Path) -> Path:
    """Make the tree of a recorded machine; see tests/native/support/tree.h."""
    for line in (_DATA / f"{name}.tree").read_text().splitlines():
        path, _, content = line.partition(" = ")
        link, arrow, target = line.partition(" -> ")
        if not line or line.startswith("#"):
            continue
        at = folder / (link if arrow else path)
        at.parent.mkdir(parents=True, exist_ok=True)
        if arrow:
            at.symlink_to(target)
        else:
            at.write_text(content + "\n")
    return folder


def smi(name: str, tool: str = "nvidia-smi") -> str:
    return f"{tool}={_DATA / f'{name}.smi.txt'}"


def test_topology_of_a_recorded_machine(tmp_path: Path) -> None:
    topology = ep.Topology.read(unpack("pcie_4", tmp_path))
    assert topology.numa_nodes == [0, 1]
    assert [gpu.vendor for gpu in topology.gpus] == ["nvidia"] * 4
    assert [gpu.numa_node for gpu in topology.gpus] == [0, 0, 0, 1]
    assert [(nic.name, nic.port_state) for nic in topology.nics] == [
        ("mlx5_0", "active"),
        ("mlx5_1", "active"),
    ]
    assert topology.gpu_links[0, 1] == "PIX"
    assert topology.gpu_links[2, 3] == "SYS"
    assert topology.nic_links[3, "mlx5_1"] == "PXB"
    assert [topology.nic(gpu) for gpu in range(4)] == ["mlx5_0", "mlx5_0", "mlx5_0", "mlx5_1"]


def test_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    topology = ep.Topology.read(unpack("nvlink_8", tmp_path))
    topology.apply_smi("nvidia-smi", (_DATA / "nvlink_8.smi.txt").read_text())
    again = ep.Topology.load(topology.text)
    assert again.text == topology.text
    assert again.gpu_links == topology.gpu_links
    assert set(again.gpu_links.values()) == {"NV18"}


def test_a_filter_narrows_the_choice_of_nics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = ep.Topology.read(unpack("pcie_4", tmp_path))
    assert topology.nic(0, only="mlx5_1") == "mlx5_1"
    with pytest.raises(ValueError, match="mlx5_7"):
        topology.nic(0, only="mlx5_0,mlx5_7")
    monkeypatch.setenv(_FILTER, "mlx5_1")
    assert topology.nic(0) == "mlx5_1"


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    topology = ep.Topology.read(unpack("one_gpu", tmp_path))
    with pytest.raises(ValueError, match=r"gpu is 1; it must be in \[0, 1\)"):
        topology.nic(1)
    with pytest.raises(ValueError, match='tool is "rocm-smi"'):
        topology.apply_smi("rocm-smi", "")
    before = topology.text
    with pytest.raises(ValueError, match="GPU"):
        topology.apply_smi("nvidia-smi", (_DATA / "pcie_4.smi.txt").read_text())
    assert topology.text == before
    with pytest.raises(ValueError, match="line 2"):
        ep.Topology.load("mooncake_ep topology 1\ngpu one\nend\n")
    with pytest.raises(ep.EpError, match="nowhere"):
        ep.Topology.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"root .* has a NUL in it"):
        ep.Topology.read(f"{tmp_path}\0nowhere")
    with pytest.raises(TypeError, match="root is a int, not a path"):
        ep.Topology.read(0)  # type: ignore[arg-type]


def test_topo_prints_the_matrix(tmp_path: Path) -> None:
    text = succeed(
        "topo",
        "--root",
        str(unpack("metax_pairs", tmp_path)),
        "--smi",
        smi("metax_pairs", "mx-smi"),
    )
    rows = [line.split() for line in text.splitlines()[:5]]
    assert rows[0][:4] == ["GPU0", "GPU1", "GPU2", "GPU3"]
    assert [row[:5] for row in rows[1:]] == [
        ["GPU0", "X", "MX", "NODE", "NODE"],
        ["GPU1", "MX", "X", "NODE", "NODE"],
        ["GPU2", "NODE", "NODE", "X", "MX"],
        ["GPU3", "NODE", "NODE", "MX", "X"],
    ]


def test_topo_of_a_machine_without_gpus(tmp_path: Path) -> None:
    text = succeed("topo", "--root", str(unpack("no_gpu", tmp_path)))
    assert text.startswith("no GPU and no NIC; ")


# A machine that has no GPU, or no GPU and no NIC, has nobody who would ask for the NIC of one.
@pytest.mark.parametrize("lines", [["numa 0"], ["numa 0", _NIC]], ids=["no_nic", "a_nic"])
@pytest.mark.parametrize("only", ["mlx5_99", "mlx5_0,mlx5_99", "mlx5_0,", " "])
def test_topo_refuses_a_filter_that_names_no_nic_on_any_machine(
    lines: list[str], only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saved_topology(tmp_path, lines)
    monkeypatch.setenv(_FILTER, only)
    here = "mlx5_0" if _NIC in lines else "none"
    wrong = only.split(",")[-1 if _NIC in lines else 0]
    expected = f'{_FILTER}="{only}" names "{wrong}", but the NICs are: {here}'
    assert refuse("topo", "--load", saved).endswith(expected)


@pytest.mark.parametrize("only", ["", "mlx5_0", " mlx5_0 ", "mlx5_0,mlx5_0"])
def test_topo_takes_a_filter_that_names_what_is_there(
    only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saved_topology(tmp_path, ["numa 0", _NIC])
    monkeypatch.setenv(_FILTER, only)
    assert "mlx5_0" in succeed("topo", "--load", saved)


def saved_topology(folder: Path, lines: list[str]) -> str:
    """Write the text of a machine with these lines."""
    path = folder / "node.topology"
    path.write_text("\n".join(["mooncake_ep topology 1", *lines, "end", ""]))
    return str(path)


def test_topo_saves_and_loads(tmp_path: Path) -> None:
    saved = tmp_path / "node.topology"
    root = unpack("nvlink_8", tmp_path / "tree")
    first = succeed("topo", "--root", str(root), "--smi", smi("nvlink_8"), "--save", str(saved))
    assert succeed("topo", "--load", str(saved)) == first
    facts = json.loads(succeed("topo", "--load", str(saved), "--json"))
    assert facts["gpus"][3]["nic"] == "mlx5_5"
    assert {link["link"] for link in facts["gpu_links"]} == {"NV18"}


def test_topo_shows_this_machine() -> None:
    assert succeed("topo")


def test_topo_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    picture = tmp_path / "topology.svg"
    root = unpack("nvlink_8", tmp_path / "tree")
    succeed("topo", "--root", str(root), "--smi", smi("nvlink_8"), "--plot", str(picture))
    drawn = picture.read_text()
    assert all(f"<!-- {word} -->" in drawn for word in ("GPU0", "GPU7", "mlx5_11", "NV18", "PIX"))


def test_a_filter_that_names_no_nic_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_FILTER, "mlx5_99")
    root, picture = unpack("pcie_4", tmp_path / "tree"), tmp_path / "topology.png"
    line = refuse("topo", "--root", str(root), "--plot", str(picture))
    assert f'{_FILTER}="mlx5_99" names "mlx5_99"' in line
    assert not picture.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--load", "missing.topology"), "missing.topology"),
        (("--smi", "nvidia-smi"), "TOOL=FILE"),
        (("--root", "missing-root"), "missing-root"),
        (("--plot", "/proc/picture.png"), "--plot /proc/picture.png: "),
        (("--save", "/proc/text"), "--save /proc/text: "),
    ],
)
def test_topo_refuses(arguments: tuple[str, ...], message: str) -> None:
    assert message in refuse("topo", *arguments)
