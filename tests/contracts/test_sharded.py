"""Optimizers on DTensors: two processes with a piece each walk as one with the whole."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.multiprocessing as mp

from effuse.optim import SGDP, AdamP, AdamR, DiffGrad, SGDSaI
from effuse.optim.sgd_sai import signal_to_noise

MAKERS = {
    "sgd_sai": functools.partial(SGDSaI, lr=1e-2),
    "adamp": functools.partial(AdamP, lr=1e-2, weight_decay=0.1, delta=0.9),
    "adamp-layer": functools.partial(AdamP, lr=1e-2, weight_decay=0.1, delta=1.6),
    "sgdp": functools.partial(SGDP, lr=1e-2, momentum=0.9, delta=4.0, nesterov=True),
    "diffgrad": functools.partial(DiffGrad, lr=1e-2, weight_decay=0.1),
    "adam_r": functools.partial(AdamR, lr=1e-2, weight_decay=0.1),
}
SHAPES = ((6, 5), (3, 4, 2), (1, 7), (5,), (1,))  # some do not divide, some leave a process empty


def process(rank, store, out):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, make in MAKERS.items():
        for axis in (0, 1):
            rng = torch.Generator().manual_seed(0)
            whole = [
                torch.nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64))
                for s in SHAPES
            ]
            cuts = [[Shard(min(axis, p.ndim - 1))] for p in whole]
            parts = [
                torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, cut))
                for p, cut in zip(whole, cuts, strict=True)
            ]
            one, two = make(whole), make(parts)
            for _ in range(3):
                for p, q, cut in zip(whole, parts, cuts, strict=True):
                    p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float64)
                    q.grad = distribute_tensor(p.grad.clone(), mesh, cut)
                one.step()
                two.step()
            apart = [float((p - q.full_tensor()).abs().max()) for p, q in zip(whole, parts)]
            fired = [getattr(o, "fired", dict)() for o in (one, two)]
            same = copy.deepcopy(two.state_dict()) is not None
            found[f"{name}, cut along {axis}"] = (
                max(apart),
                fired[0] == fired[1] and same,
                fired[0],
            )
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def test_pieces_walk_as_the_whole(tmp_path):
    mp.spawn(process, (str(tmp_path / "store"), str(tmp_path / "out.pt")), nprocs=2)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert len(found) == 2 * len(MAKERS)
    for name, (apart, same, fired) in found.items():
        assert apart < 1e-12, name
        assert same, (name, fired)
    views = [fired for *_, fired in found.values() if fired]
    assert any(f["channel"] for f in views), views
    assert any(f["layer"] for f in views), views


def test_a_piece_alone_has_another_scale():
    g = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert signal_to_noise(g[:3]) != pytest.approx(signal_to_noise(g), rel=1e-2)
