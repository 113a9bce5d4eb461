"""The loop: several batches an update, schedules, low precision, what is not finite, shards."""

import copy

import pytest
import ranked
import torch
from torch import nn

from fastscore import losses, training
from fastscore.averages import averaged
from fastscore.training import checkpoint, ranks

SIGMAS = [1.0, 0.1]
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def loss(net, batch, step):
    x, first = batch
    key = {"seed": 3, "step": step, "first_sample": first}
    return losses.noise_conditional(lambda x, sigma: net(x), x, SIGMAS, **key)


def cut(*sizes):
    """The 12 samples in batches of these sizes."""
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [(X[k : k + n], k) for k, n in zip(starts, sizes)]


def weights(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def trained(batches, *, net=None, steps=20, **options):
    net = net or network()
    *_, last = training.training_loop(net, batches, loss, steps=steps, **options)
    return net, last


@pytest.mark.parametrize("sizes", [(6, 6), (4, 4, 4), (7, 4, 1)], ids=str)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_an_update_of_several_batches_is_that_of_one(sizes, clip):
    """Of equal size or not: the gradient is that of the mean over all samples."""
    whole, step = trained(cut(12), grad_clip=clip)
    parts, found = trained(cut(*sizes), accumulate=len(sizes), grad_clip=clip)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.losses, step.losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights(found.ema), weights(step.ema), rtol=1e-11, atol=1e-13)


def test_scalars_of_several_batches_count_alike():
    def mean(net, batch, step):
        return loss(net, batch, step).mean()

    nets = [network(), network()]
    for net, batches, number in zip(nets, (cut(12), cut(6, 6)), (1, 2)):
        *_, last = training.training_loop(net, batches, mean, steps=5, accumulate=number)
    torch.testing.assert_close(weights(nets[1]), weights(nets[0]), rtol=1e-11, atol=1e-13)
    assert last.losses.shape == (2,)


def test_a_schedule_of_pytorch_is_followed():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    rates = []
    steps = training.training_loop(
        net, cut(12), loss, steps=5, optimizer=optimizer, scheduler=scheduler
    )
    for _ in steps:
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_schedules_that_the_loop_cannot_follow_are_refused():
    net = network()
    optimizer, other = (torch.optim.SGD(net.parameters(), lr=1.0) for _ in range(2))
    schedulers = torch.optim.lr_scheduler
    cases = [
        (schedulers.StepLR(other, 2), ValueError, "must be of the optimizer that is given"),
        (schedulers.ReduceLROnPlateau(optimizer), ValueError, "follows a value that the loop doe"),
        (3, TypeError, "must be one of torch.optim.lr_scheduler; got 3"),
    ]
    for scheduler, kind, message in cases:
        with pytest.raises(kind, match=message):
            trained(cut(12), net=net, optimizer=optimizer, scheduler=scheduler)
    with pytest.raises(ValueError, match=r"autocast must be torch.bfloat16 or None .* got torch.f"):
        trained(cut(12), autocast=torch.float16)
    for nonfinite in (-1, 1.5, "skip", True):
        with pytest.raises(ValueError, match="nonfinite must be"):
            trained(cut(12), nonfinite=nonfinite)


def test_autocast_computes_in_bfloat16_and_keeps_float32():
    """Losses, gradients and averages; ten steps differ by a few of bfloat16's 2^-8."""
    seen = []

    def watched(net, batch, step):
        net[0].register_forward_hook(lambda m, i, y: seen.append(y.dtype), always_call=False)
        return loss(net, (batch[0].float(), batch[1]), step)

    nets = [network(torch.float32) for _ in range(2)]
    for net, autocast in zip(nets, (None, torch.bfloat16)):
        *_, last = training.training_loop(net, cut(12), watched, steps=10, autocast=autocast)
        assert seen[-1] == (autocast or torch.float32)
        assert last.losses.dtype == torch.float32
        assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    start = weights(network(torch.float32))
    moved = [weights(net) - start for net in nets]
    assert 0 < float((moved[1] - moved[0]).norm()) < 0.1 * float(moved[0].norm())


def state_of(net, ema, optimizer):
    """All that an update changes."""
    tensors = [*net.state_dict().values(), *ema.state_dict().values()]
    tensors += [t for entry in optimizer.state.values() for t in entry.values()]
    return [t.clone() for t in tensors]


def spoilt(where, at=7):
    """The loss, not finite in one step: of a sample, or in its gradient only."""

    def spoiling(net, batch, step):
        found = loss(net, batch, step)
        if step != at:
            return found
        if where == "loss":
            return torch.where(torch.arange(len(found)) == 3, float("inf"), found)
        # √ of zero: the value is right, its slope is infinite.
        return found + (0 * weight_sum(net)).sqrt()

    return spoiling


def weight_sum(net):
    return sum(p.square().sum() for p in net.parameters())


def with_optimizer(**options):
    net = network()
    return net, averaged(net, 0.9), torch.optim.Adam(net.parameters(), **options)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(where):
    """Nothing of it changes weights, average or optimizer; all others are as if it were not."""
    net, ema, optimizer = with_optimizer()
    policy = training.NonFinite(1, describe=lambda batch, step, i: f"number {batch[1] + i}")
    options = {"steps": 12, "optimizer": optimizer, "ema": ema, "nonfinite": policy}
    states = []
    names = {"loss": r"the loss is inf at step 7", "gradient": r"the gradient is not finite at st"}
    with pytest.warns(UserWarning, match=rf"step 7 is skipped \(1 of 1\): {names[where]}") as told:
        for _ in training.training_loop(net, cut(12), spoilt(where), **options):
            states.append(state_of(net, ema, optimizer))
    assert all(map(torch.equal, states[7], states[6]))
    assert not any(map(torch.equal, states[8][:6], states[7][:6]))
    assert policy.skipped == [7]
    text = str(told[0].message)
    assert ("1 of 12 samples, the first of them sample 3 (number 3)" in text) == (where == "loss")

    with pytest.raises(FloatingPointError, match=names[where]):
        trained_until_spoilt(where)


def trained_until_spoilt(where, **options):
    net = network()
    return list(training.training_loop(net, cut(12), spoilt(where), steps=12, **options))


def test_more_than_may_be_skipped_ends_the_loop():
    def never(net, batch, step):
        return loss(net, batch, step) * float("nan")

    steps = training.training_loop(network(), cut(12), never, steps=9, nonfinite=2)
    with pytest.warns(UserWarning, match="is skipped"):
        assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        next(steps)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_on_a_device_that_is_asked_late_nothing_is_updated_either(where, monkeypatch):
    """As on a GPU, whose fused optimizer leaves out the update: here the CPU's."""
    begin = training.NonFinite.begin

    def late(self, *arguments):
        begin(self, *arguments)
        self._late = True

    monkeypatch.setattr(training.NonFinite, "begin", late)
    net, ema, optimizer = with_optimizer(fused=True)
    policy = training.NonFinite()
    options = {"steps": 150, "optimizer": optimizer, "ema": ema, "nonfinite": policy}
    states = []
    steps = training.training_loop(net, cut(12), spoilt(where), **options)
    with pytest.raises(FloatingPointError, match=r"at step 7.*; the weights are finite"):
        for _ in steps:
            states.append(state_of(net, ema, optimizer))
    # The hundredth step was the one to look at.
    assert len(states) == 99
    moments = slice(-3 * len(list(net.parameters())), None)
    for part in (slice(0, 6), moments):
        assert all(map(torch.equal, states[7][part], states[6][part]))
    assert all(t.isfinite().all() for t in states[-1])

    # Or whoever wants to save before.
    net, ema, optimizer = with_optimizer(fused=True)
    policy = training.NonFinite()
    options |= {"steps": 9, "optimizer": optimizer, "ema": ema, "nonfinite": policy}
    for state in training.training_loop(net, cut(12), spoilt(where), **options):
        if state.step == 7:
            break
        policy.look()
    with pytest.raises(FloatingPointError, match="at step 7"):
        policy.look()


def train_together(folder):
    """On two processes, of 7 and 5 samples; one of them has a loss that is not finite."""
    with ranks.joined() as together:
        net = network()
        called = together.wrapped(net)
        batches = [cut(7, 5)[together.rank]]

        def spoiling(net, batch, step):
            found = loss(net, batch, step)
            return found / 0 if (step, together.rank) == (7, 1) else found

        with pytest.warns(UserWarning, match=r"step 7 is skipped \(1 of 1\): the loss is "):
            *_, last = training.training_loop(called, batches, spoiling, steps=20, nonfinite=1)
        found = {"net": weights(net), "ema": weights(last.ema)}
        checkpoint.save(folder / str(together.rank), found)
        del called, last


@pytest.mark.processes
def test_processes_of_unequal_batches_take_the_steps_of_one(tmp_path):
    """And leave out the same one where one of them has to."""
    assert ranked.run(2, train_together, tmp_path) == [0, 0]
    net = network()

    def spoiling(net, batch, step):
        return loss(net, batch, step) / (0 if step == 7 else 1)

    with pytest.warns(UserWarning, match="step 7 is skipped"):
        *_, last = training.training_loop(net, cut(12), spoiling, steps=20, nonfinite=1)
    for rank in "01":
        found = checkpoint.load(tmp_path / rank)
        torch.testing.assert_close(found["net"], weights(net), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found["ema"], weights(last.ema), rtol=1e-11, atol=1e-13)


def sharded(net, mesh):
    from torch.distributed.fsdp import fully_shard

    for part in (net[0], net[2], net):
        fully_shard(part, mesh=mesh)
    return net


def train_sharded(folder, clip):
    """On two processes: averages, clipping, accumulation, a save and its way back."""
    from torch.distributed.device_mesh import init_device_mesh

    with ranks.joined() as together:
        mesh = init_device_mesh("cpu", (together.size,))
        net = sharded(network(), mesh)
        with pytest.raises(ValueError, match="under fully_shard cannot be copied; give a second"):
            averaged(net, 0.9)
        ema = averaged(net, 0.9, into=sharded(network(), mesh))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        batches = [cut(3, 3, 3, 3)[2 * together.rank + k] for k in (0, 1)]
        options = {"optimizer": optimizer, "ema": ema, "accumulate": 2, "grad_clip": clip}
        for state in training.training_loop(net, batches, loss, steps=10, **options):
            with torch.no_grad():
                # Whole weights stay for a while.
                state.ema(X)
        tensors = checkpoint.state_of(net, ema, optimizer, 10)
        if together.leads:
            for name, found in tensors.items():
                checkpoint.save(folder / name, found)

        again = sharded(network(), mesh)
        other = averaged(again, 0.9, into=sharded(network(), mesh))
        optimizer = torch.optim.Adam(again.parameters(), lr=0.01)
        together.meet()
        saved = {name: checkpoint.load(folder / name) for name in tensors}
        assert checkpoint.restore(again, other, optimizer, saved) == 10
        options |= {"optimizer": optimizer, "ema": other, "first_step": 10}
        list(training.training_loop(again, batches, loss, steps=20, **options))
        tensors = checkpoint.state_of(again, other, optimizer, 20)
        if together.leads:
            for name, found in tensors.items():
                checkpoint.save(folder / f"{name}-20", found)
        del net, ema, optimizer, again, other, state, options


@pytest.mark.processes
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_model_in_shards_is_trained_averaged_saved_and_restored(tmp_path, clip):
    """fully_shard on two processes: what one process does, to the rounding of float64."""
    assert ranked.run(2, train_sharded, tmp_path, clip) == [0, 0]
    net, ema, optimizer = with_optimizer(lr=0.01)
    options = {"optimizer": optimizer, "ema": ema, "grad_clip": clip}
    for state in training.training_loop(net, cut(12), loss, steps=20, **options):
        if state.step in (9, 19):
            end = "" if state.step == 9 else "-20"
            tensors = checkpoint.state_of(net, ema, optimizer, state.step + 1)
            for name, expected in tensors.items():
                found = checkpoint.load(tmp_path / f"{name}{end}")
                assert found.keys() == expected.keys()
                for k, t in expected.items():
                    torch.testing.assert_close(found[k], t, rtol=1e-9, atol=1e-12)


def test_an_average_is_made_into_a_module_of_the_same_parameters_only():
    net = network()
    ema = averaged(net, 0.5, into=copy.deepcopy(net))
    ema.update_parameters(net)
    assert torch.equal(weights(ema), weights(net))
    for other in (net, nn.Linear(3, 3), network(torch.float32)):
        with pytest.raises(ValueError, match="into must be another module with the parameters"):
            averaged(net, 0.5, into=other)
