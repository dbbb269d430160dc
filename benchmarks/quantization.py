"""Mean KL of `--q-bits auto` and of uniform bits of the same size, on held-out text.

    python benchmarks/quantization.py --text FILE [--text FILE] [--tokens 4096]

For the demo model and each uniform setting (linear layers at 3 or 4 bits, the embedding
at 4, 5, 6 or 8), bits are allocated to the same size from losses on the bundled sample.
Both are then measured on the texts, which the allocation has not seen (nor the
training, if they are held-out books): mean KL from the unquantized model, in nats per
token.
"""

import argparse
from pathlib import Path


def main() -> None:
    import mlx_openelm  # noqa: F401 - loads OpenBLAS, before mlx.core is imported

    # isort: split
    import mlx.core as mx

    from converters.conversion.plan import ConversionPlan
    from converters.formats.sources import open_source
    from converters.quantization.allocation import (
        choose,
        count_tokens,
        estimate_losses,
        list_choices,
    )
    from converters.quantization.calibration import (
        calibration_windows,
        read_calibration,
    )
    from converters.quantization.receipt import measure_quantization
    from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
    from mlx_openelm.model.quantization import Packing, Quantization
    from mlx_openelm.storage.hub import demo_folder
    from mlx_openelm.storage.loading import load_tokenizer
    from mlx_openelm.storage.model_folder import open_folder

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    tokenizer = load_tokenizer(open_folder(demo_folder()))
    source = open_source("demo")
    config = source.config
    whole = ConversionPlan(source, config, mx.bfloat16, {})
    _, sample = read_calibration(None)
    priced_on = calibration_windows(
        tokenizer, sample, config, num_tokens=count_tokens(config)
    )
    share = options.tokens // len(options.text)
    windows = [
        calibration_windows(
            tokenizer, read_calibration(path)[1], config, num_tokens=share
        )
        for path in options.text
    ]
    unseen = mx.concatenate(windows)

    def mean_kl(packings: dict[str, Packing]) -> float:
        def read(name: str) -> mx.array:
            packing, weight = packings.get(name), whole.read(name)
            if packing is None:
                return weight
            return unpack_weight(packing, pack_weight(packing, weight), mx.float32)

        receipt = measure_quantization(
            config, whole.read, read, unseen, text="", bits_per_weight=0
        )
        return receipt.mean_kl

    choices = list_choices(config)
    losses = estimate_losses(config, whole.read, priced_on, choices)
    print("linears embedding  bits/weight    uniform     auto  ratio")
    for bits in (3, 4):
        for embed_bits in (4, 5, 6, 8):
            uniform = Quantization(bits, 64, embed_bits).packings(config)
            num_bytes = ConversionPlan(source, config, mx.bfloat16, uniform).num_bytes
            average = 8 * num_bytes / config.num_parameters
            a = mean_kl(choose(config, average, choices, losses))
            b = mean_kl(uniform)
            figures = f"{average:14.3f} {b:8.4f} {a:8.4f} {a / b:6.2f}"
            print(f"{bits:7} {embed_bits:9} {figures}", flush=True)


if __name__ == "__main__":
    main()
