"""Adapters: a network of diffusers, k-diffusion or EDM as score(x, sigma).

All are Modules that hold the network (parameters, modes and devices follow), pass gradients to x
and the parameters, take one σ per sample and answer in x's dtype; UNets are called in their own
dtype. The score is that of the network's own data, in [-1, 1] for most image networks;
`conversions.Rescaled(score, 2, -1)` makes it the score of images in [0, 1].
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastscore import conversions, schedules
from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import named
from fastscore.schedules.rescaled import check_table, interpolate

_DIFFUSERS_NAMES = {"epsilon": "noise", "sample": "denoiser", "v_prediction": "v"}


def prediction_kind(op: str, name: Any) -> str:
    """The kind of `conversions` for a name of either vocabulary."""
    kind = _DIFFUSERS_NAMES.get(name, name) if isinstance(name, str) else name
    if not named(kind, conversions.KINDS):
        raise ValueError(
            f"{op}: a prediction must be one of "
            f"{', '.join((*conversions.KINDS, *_DIFFUSERS_NAMES))}; got {shown(name)}."
        )
    return kind


class _Adapter(nn.Module):
    network: Callable[..., Any]
    arguments: dict[str, Any]

    def __init__(self, network: Callable[..., Any], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.arguments = arguments

    def each(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """σ as (B,), checked, in the compute dtype."""
        checks.check_float(type(self).__name__, "x", x)
        sigma = checks.coefficient(type(self).__name__, "sigma", sigma, x, minimum=1e-30)
        if not isinstance(sigma, Tensor):
            sigma = checks.as_tensor(sigma, x)
        return sigma.expand(x.shape[:1])

    def unet(self, x: Tensor, condition: Tensor) -> Tensor:
        """A UNet's answer in x's dtype.

        Of twice the channels (a learned variance) the first half.
        """
        theirs = x.to(getattr(self.network, "dtype", x.dtype))
        answer = self.network(theirs, condition, **self.arguments)
        if hasattr(answer, "sample"):
            answer = answer.sample
        elif isinstance(answer, tuple):
            answer = answer[0]

        if x.dim() > 1 and answer.dim() == x.dim() and answer.shape[1] == 2 * x.shape[1]:
            answer = answer[:, : x.shape[1]]

        return self.like(answer.to(x.dtype), x)

    def like(self, answer: Tensor, x: Tensor) -> Tensor:
        """The answer, checked to be like x."""
        checks.check_like(type(self).__name__, "the network's answer", answer, x)
        return answer


class VeUNet(_Adapter):
    """A diffusers UNet2DModel of a VE process (google/ncsnpp-*, ScoreSdeVePipeline).

    With time_embedding_type "fourier" the network is called unet(x, σ), embeds ln σ and divides its
    output by σ: it returns the score.

    Args:
        unet: called unet(sample, timestep) -> .sample. arguments: passed on, e.g. class_labels.

    Raises:
        ValueError: the network's config says that it embeds discrete timesteps.
    """

    def __init__(self, unet: Callable[..., Any], **arguments: Any) -> None:
        embedding = getattr(getattr(unet, "config", None), "time_embedding_type", "fourier")
        if embedding != "fourier":
            raise ValueError(
                f"VeUNet: the UNet must have time_embedding_type 'fourier'; got {embedding!r}, "
                "which VpUNet takes."
            )
        super().__init__(unet, arguments)

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.unet(x, self.each(x, sigma).float())


class VpUNet(_Adapter):
    """A diffusers UNet of a discrete VP process (DDPM, DDIM and most others), as the score of x =
    x₀ + σ z.

        ᾱ = 1/(1 + σ²),    t: σ(t) = σ,    prediction = unet(√ᾱ x, t),
        s = -ẑ/σ for a noise prediction ẑ

    Args:
        unet: called unet(sample, timestep) -> .sample. alphas_cumprod: ᾱ of timesteps 0 .. N-1, as
            its scheduler holds it.
        prediction: "epsilon", "sample", "v_prediction", or "noise", "denoiser", "v", "score" (of √ᾱ
            x).
        round_timesteps: call the network at the nearest whole timestep; fractions are interpolated
            in ln σ otherwise.
        arguments: passed on, e.g. class_labels or encoder_hidden_states.

    Raises:
        ValueError: the config says "fourier", an unknown prediction, no ᾱ table; when called, σ
            outside the table.
    """

    kind: str
    round_timesteps: bool

    def __init__(
        self,
        unet: Callable[..., Any],
        alphas_cumprod: Tensor | Sequence[float],
        *,
        prediction: str = "epsilon",
        round_timesteps: bool = False,
        **arguments: Any,
    ) -> None:
        if getattr(getattr(unet, "config", None), "time_embedding_type", None) == "fourier":
            raise ValueError(
                "VpUNet: the UNet must embed discrete timesteps; its time_embedding_type is "
                "'fourier', which VeUNet takes."
            )

        log_table = check_table("VpUNet", alphas_cumprod)
        super().__init__(unet, arguments)
        self.kind = prediction_kind("VpUNet", prediction)
        self.round_timesteps = round_timesteps
        self._log_tables = {log_table.device: log_table}   # no buffer: .half() must not round it

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = self.each(x, sigma)
        t = interpolate(sigma, self._log_table(sigma.device))
        root = schedules.alphas_cumprod(sigma).sqrt()
        x_vp = (x * checks.expand(root, x)).to(x.dtype)
        prediction = self.unet(x_vp, t.round().long() if self.round_timesteps else t)
        score = conversions.convert(
            prediction, x_vp, sigma * root, root, kind=self.kind, to="score"
        )
        return conversions.vp_to_ve(score, root.square())

    def _log_table(self, device):
        if device not in self._log_tables:
            self._log_tables[device] = next(iter(self._log_tables.values())).to(device)
        return self._log_tables[device]


def score_of_pipeline(pipeline: Any, **arguments: Any) -> VeUNet | VpUNet:
    """The score of an unconditional diffusers pipeline.

    a VeUNet, or a VpUNet with its scheduler's ᾱ table and prediction_type.

    Raises:
        ValueError: the pipeline has no unet, or a scheduler without alphas_cumprod beside a UNet of
            discrete timesteps.
    """
    unet = getattr(pipeline, "unet", None)
    scheduler = getattr(pipeline, "scheduler", None)
    if unet is None:
        raise ValueError(
            f"score_of_pipeline: the pipeline must have a unet; {type(pipeline).__name__} has none."
        )
    if getattr(unet.config, "time_embedding_type", None) == "fourier":
        return VeUNet(unet, **arguments)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "score_of_pipeline: the scheduler must have alphas_cumprod; "
            f"{type(scheduler).__name__} has none."
        )

    return VpUNet(
        unet, scheduler.alphas_cumprod, prediction=scheduler.config.prediction_type, **arguments
    )


class _Denoiser(_Adapter):
    """D = network(x, σ), s = (D - x)/σ².

    x keeps its dtype: these networks round inside, after the skip connection is split off.
    """

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = self.each(x, sigma)
        denoised = self.like(self.network(x, sigma, **self.arguments).to(x.dtype), x)
        return conversions.convert(denoised, x, sigma, kind="denoiser", to="score")


def k_diffusion(model: Callable[..., Tensor], **arguments: Any) -> nn.Module:
    """The score of a k-diffusion denoiser, model(x, sigma) -> denoised. arguments: its extra_args.

    The other way round, a score serves k-diffusion's samplers as `conversions.Converted(score,
    kind="score", to="denoiser")`.
    """
    return _Denoiser(model, arguments)


def edm(
    net: Callable[..., Tensor], class_labels: Tensor | None = None, **arguments: Any
) -> nn.Module:
    """The score of an EDM network, net(x, sigma, class_labels) -> D, e.g.

    The `ema` of a pickle of NVlabs/edm.

    Args:
        class_labels: one-hot (B, classes) or (1, classes), or None. arguments: passed on, e.g.
            force_fp32.
    """
    return _Denoiser(net, {"class_labels": class_labels, **arguments})
