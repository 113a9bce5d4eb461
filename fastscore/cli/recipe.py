"""The command `fastscore recipe`."""


def recipe(data: str = "digits", budget: int = 1000, sigma_max: float | None = None, sigma_min: float = 0.01, overlap: float = 0.5,
           denoise: bool = True, seed: int = 0) -> None:  # fmt: skip
    """Choose noise levels and step sizes for a data set and a number of network calls, by NCSNv2's techniques 1, 2 and 4.

    Args:
        data: digits, mnist, fashion, a folder of images, or an .npz or .npy file.
        budget: network calls for one batch of samples.
        sigma_max: largest noise; the largest distance between samples unless given.
        sigma_min: smallest noise.
        overlap: of neighbouring levels; the official NCSNv2 configurations have 0.567.
        denoise: keep one call for the final noise-free step.
        seed: of the random subset in which distances are looked for where the data are many.
    """
    from fastscore import datasets, schedules

    plan = schedules.recipe(
        datasets.load(data)[0], budget, sigma_max=sigma_max, sigma_min=sigma_min, overlap=overlap, denoise=denoise, seed=seed
    )
    ladder = f"--sigma-max {plan.sigmas[0]:.6g} --sigma-min {plan.sigmas[-1]:.6g} --levels {len(plan.sigmas)}"
    print(f"{plan}\n\nfastscore train --data {data} --out run {ladder}")
    print(f"fastscore sample run --steps-per-level {plan.steps_per_level} --step-size {plan.step_size:.6g}")
