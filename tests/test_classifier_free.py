"""Classifier-free guidance against Bayes' rule in closed form, in every sampler of scores."""

import io
import pickle

import pytest
import torch

import fastscore
from fastscore import guidance, models, schedules
from fastscore.models import UNet

F64 = torch.float64
SIGMAS = schedules.geometric(1.0, 0.1, 3)
SAMPLERS = {
    "annealed_langevin": {"sigmas": SIGMAS, "steps_per_level": 2, "step_size": 2e-3},
    "consistent_annealed": {"sigmas": SIGMAS},
    "predictor_corrector": {"sigmas": SIGMAS},
    "probability_flow": {"sigmas": SIGMAS},
    "langevin": {"steps": 3, "step_size": 0.01, "sigma": 0.5},
}
WEIGHTS = torch.tensor([0.4, 0.6], dtype=F64)
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64)


class Mixture:
    """The scores of a mixture of two classes, of one of them, and the logarithm of its share."""

    def __init__(self):
        covariance = 0.3 * torch.eye(2, dtype=F64)
        self.all = models.GaussianMixture(WEIGHTS, MEANS, covariance.expand(2, 2, 2))
        self.classes = [models.Gaussian(mean, covariance) for mean in MEANS]

    def __call__(self, x, sigma, label=None):
        if label is None:
            return self.all.score(x, sigma)
        scores = torch.stack([g.score(x, sigma) for g in self.classes])
        label = torch.as_tensor(label).expand(len(x))
        return torch.where((label < 0)[:, None], self.all.score(x, sigma),
                           scores[label.clamp(0), torch.arange(len(x))])

    def log_share(self, x, sigma, label):
        """log p(label | x_σ)."""
        log_joint = torch.stack([
            w.log() - (x - m).square().sum(1) / (2 * (0.3 + sigma**2))
            for w, m in zip(WEIGHTS, MEANS)
        ])
        return log_joint.log_softmax(0)[label, torch.arange(len(x))]


def batch(n=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 2, generator=generator, dtype=F64)


@pytest.mark.parametrize("w", [-1, -0.5, 0, 1.0, 3])
@pytest.mark.parametrize("label", [1, torch.tensor([0, 1, 1, 0, 1])])
def test_it_is_bayes_rule_with_a_sharpened_likelihood(w, label):
    """∇ log p(x) + (1 + w) ∇ log p(label | x)."""
    net, sigma = Mixture(), 0.5
    x = batch().requires_grad_()
    share = net.log_share(x, sigma, torch.as_tensor(label).expand(5))
    (slope,) = torch.autograd.grad(share.sum(), x)

    s = guidance.classifier_free(net, label, weight=w)(x, sigma)
    torch.testing.assert_close(s, net.all.score(x, sigma) + (1 + w) * slope)


def test_each_sample_has_its_weight_and_a_dropped_label_no_guidance():
    net, x = Mixture(), batch()
    w = torch.tensor([-1.0, 0.0, 2.0, 1.0, 1.0], dtype=F64)
    label = torch.tensor([0, 1, 0, -1, 1])
    s = guidance.classifier_free(net, label, weight=w)(x, 0.5)
    torch.testing.assert_close(s[0], net(x, 0.5)[0])
    torch.testing.assert_close(s[1], net(x, 0.5, 1)[1])
    torch.testing.assert_close(s[2], (3 * net(x, 0.5, 0) - 2 * net(x, 0.5))[2])
    torch.testing.assert_close(s[3], net(x, 0.5)[3])


@pytest.mark.parametrize(("w", "calls"), [(0, [7]), (-1.0, [None]), (1, [7, None])])
def test_what_is_not_needed_is_not_called(w, calls):
    called = []

    def net(x, sigma, label=None):
        called.append(label)
        return -x

    guidance.classifier_free(net, 7, weight=w)(batch(), torch.ones(5))
    assert called == calls


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_of_scores_takes_it(sampler):
    net = Mixture()
    label = torch.tensor([0, 1, 1, 0])
    guided = guidance.classifier_free(net, label, weight=2.0)

    def by_hand(x, sigma):
        return 3 * net(x, sigma, label) - 2 * net(x, sigma)

    options = {"sampler": sampler, "seed": 4, "shape": (4, 2), "dtype": F64, **SAMPLERS[sampler]}
    torch.testing.assert_close(
        fastscore.sample(guided, **options), fastscore.sample(by_hand, **options)
    )


def unet():
    torch.manual_seed(0)
    net = UNet(width=8, multipliers=(1, 2), blocks=1, num_classes=3, context=2, dropout=0.5)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


@pytest.mark.parametrize("context", [torch.tensor([0.2, -1.0]), torch.randn(4, 2)])
def test_a_unet_with_classes_and_contexts(context):
    net = unet().eval()
    x, sigma = torch.rand(4, 1, 6, 6), torch.tensor([0.1, 0.5, 1.0, 2.0])
    label = torch.tensor([0, 2, -1, 1])
    s = guidance.classifier_free(net, label, context=context, weight=0.5)(x, sigma)
    with_them = net(x, sigma, label, context.expand(4, 2))
    torch.testing.assert_close(s, 1.5 * with_them - 0.5 * net(x, sigma))


def test_a_network_in_training_mode_is_sampled_in_evaluation_mode():
    net = unet().train()
    guided = guidance.classifier_free(net, 1)
    options = {"shape": (3, 1, 6, 6), "seed": 1, **SAMPLERS["annealed_langevin"]}
    drawn = fastscore.sample(guided, **options)
    assert net.training
    net.eval()
    assert torch.equal(fastscore.sample(guided, **options), drawn)


def test_derivatives_go_through_it():
    net = Mixture()
    guided = guidance.classifier_free(net, 1, weight=torch.full((5,), 2.0, dtype=F64))
    x, v = batch().requires_grad_(), batch(5).flip(0)
    _, tangent = fastscore.jvp(lambda x: guided(x, 0.5), x, v)
    expected = torch.func.jvp(lambda x: 3 * net(x, 0.5, 1) - 2 * net(x, 0.5), (x,), (v,))[1]
    torch.testing.assert_close(tangent, expected)
    assert torch.autograd.gradcheck(lambda x: guided(x, 0.5), x)


def test_it_can_be_pickled_and_printed():
    guided = guidance.classifier_free(unet().eval(), 1, weight=0.5)
    again = pickle.load(io.BytesIO(pickle.dumps(guided)))
    x = torch.rand(2, 1, 6, 6)
    assert torch.equal(again(x, 0.5), guided(x, 0.5))
    assert "weight" in repr(guided)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: guidance.classifier_free(Mixture()), ValueError, "got neither"),
        (lambda: guidance.classifier_free(None, 1), TypeError, "net must be"),
        (lambda: guidance.classifier_free(Mixture(), 1.5), TypeError, "label must be"),
        (lambda: guidance.classifier_free(Mixture(), True), TypeError, "label must be"),
        (lambda: guidance.classifier_free(Mixture(), torch.ones(2, 2, dtype=torch.int64)),
         TypeError, r"label must be .* \(2, 2\)"),
        (lambda: guidance.classifier_free(Mixture(), torch.ones(5)), TypeError, "float32"),
        (lambda: guidance.classifier_free(Mixture(), context=[1.0]), TypeError, "context must be"),
        (lambda: guidance.classifier_free(Mixture(), context=torch.ones(1, 2, 3)), ValueError,
         r"got \(1, 2, 3\)"),
        (lambda: guidance.classifier_free(Mixture(), 1, weight=float("nan")), ValueError,
         "weight must be finite"),
        (lambda: guidance.classifier_free(Mixture(), torch.tensor([0, 1]))(batch(), 0.5),
         ValueError, "label must be one for each of the 5 samples; got 2"),
        (lambda: guidance.classifier_free(Mixture(), 0, weight=torch.ones(2))(batch(), 0.5),
         ValueError, "weight must"),
        (lambda: guidance.classifier_free(lambda x, s, label=0: x.sum(1), 0)(batch(), 0.5),
         ValueError, "classifier_free"),
    ],
)   # fmt: skip
def test_what_does_not_fit_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
