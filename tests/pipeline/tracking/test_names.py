"""Names of metrics in MLflow."""

import math

import pytest

from megabase.pipeline.tracking.names import metric_name, metrics_of, system_name


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("loss", "train/loss"),
        ("lr", "train/lr"),
        ("update_ratio", "train/update_ratio"),
        ("valid_bits_per_base", "valid/bits_per_base"),
        ("valid_from_16_bits_per_base", "valid/from_16_bits_per_base"),
        ("full_valid_loss", "full_valid/loss"),
        ("tokens_per_second_per_device", "speed/tokens_per_second_per_device"),
        ("model_tflops", "speed/model_tflops"),
        ("data_wait", "speed/data_wait"),
        ("step_seconds_most", "speed/step_seconds_most"),
        ("peak_memory_bytes", "memory/peak_bytes"),
        ("rank_memory_bytes_most", "memory/rank_bytes_most"),
        ("lsh_3_mass_0", "lsh/layer_3_mass_0"),
        ("checkpoint_held_seconds", "checkpoint/held_seconds"),
    ],
)
def test_numbers_are_in_groups(name: str, metric: str) -> None:
    assert metric_name(name) == metric


def test_a_loss_has_its_perplexity_beside_it() -> None:
    assert dict(metrics_of("loss", 1.25)) == {"train/loss": 1.25, "train/perplexity": math.exp(1.25)}
    assert dict(metrics_of("valid_loss", 1.0)) == {"valid/loss": 1.0, "valid/perplexity": math.e}
    assert dict(metrics_of("loss", 1e6)) == {"train/loss": 1e6}
    assert dict(metrics_of("loss", math.inf)) == {"train/loss": math.inf}
    assert dict(metrics_of("mfu", 0.3)) == {"speed/mfu": 0.3}


def test_nodes_have_groups_of_their_own() -> None:
    assert system_name("n1", "cpu_percent") == "system/n1/cpu_percent"
