"""Scoring SmolLM2 against PyTorch doing what the paper's authors do. See README.md.

python benchmarks/language_scoring.py models/smollm2
"""

import tempfile

import numpy as np
import smollm2
import torch
from timing import exit_unless, interleave, median_ratio

import easy_jax as ej

PROBLEMS = 64
BATCH_SIZE = 8  # of PyTorch, in examples; ours in rows:
ROWS = 4
ROUNDS = 3
BOUND = 3.0


def main() -> None:
    folder = smollm2.folder()
    examples = smollm2.examples(folder, PROBLEMS)
    mesh = ej.make_mesh()
    model = ej.hugging_face.load(folder, mesh=mesh)
    reference = smollm2.torch_model(folder).eval()
    weights = {}

    def ours() -> None:
        with tempfile.TemporaryDirectory() as directory:
            table = ej.score(
                model,
                ej.PackedSource(examples, smollm2.ROW_LENGTH),
                directory,
                loss_fn=ej.causal_lm_token_losses,
                token_losses=True,
                batch_size=ROWS,
                mesh=mesh,
            )
            weights["ours"] = table.flow_weights()

    def sequence_losses() -> np.ndarray:
        losses = []
        for start in range(0, PROBLEMS, BATCH_SIZE):
            batch = smollm2.torch_batch(examples, np.arange(start, start + BATCH_SIZE))
            nll_BT = smollm2.torch_nll(reference, batch, with_labels=True)
            losses.append(nll_BT.sum(1) / (batch["labels"] != -100).sum(1))
        return torch.cat(losses).numpy()

    @torch.no_grad()
    def theirs() -> None:
        tau = np.median(sequence_losses())  # one pass for the temperature ...
        weights["torch"] = np.exp(-sequence_losses() / tau)  # ... and one for the weights

    seconds = interleave({"ours": ours, "torch": theirs}, ROUNDS)
    np.testing.assert_allclose(weights["ours"], weights["torch"], rtol=1e-3)
    rate = {name: PROBLEMS / np.median(times.wall) for name, times in seconds.items()}
    ratio = median_ratio(seconds["torch"].wall, seconds["ours"].wall)
    ratio_cpu = median_ratio(seconds["torch"].cpu, seconds["ours"].cpu)
    print(
        f"language_scoring: easy_jax {rate['ours']:.2f} examples/s, PyTorch in two padded passes "
        f"{rate['torch']:.2f}, RATIO {ratio:.2f} (bound {BOUND}; of CPU time {ratio_cpu:.2f})"
    )
    exit_unless(ratio >= BOUND, f"ours / PyTorch >= {BOUND}")


if __name__ == "__main__":
    main()
