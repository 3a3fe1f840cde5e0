"""Numbers that nothing can be made of are refused as the command's usage, before any work."""

import pytest
from click.testing import CliRunner

from deploy.cli import vggrow


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("summary D --width nan", "--width': expected a finite number, got nan"),
        ("summary D --width inf", "--width': inf is not in the range"),
        ("summary D --crop 320000000", "--crop': 320000000 is not in the range 32<=x<=16384"),
        ("summary D --classes 99999999999999999999", "--classes': 99999999999999999999 is not in the range 2<=x<=100000"),
        ("plan pyproject.toml --classes 99999999999999999999", "--classes': 99999999999999999999 is not in the range"),
        ("plan pyproject.toml --pictures 99999999999999999999", "--pictures': 99999999999999999999 is not in the range"),
        ("train pyproject.toml --cache-gib inf", "--cache-gib': expected a finite number, got inf"),
        ("train pyproject.toml --stall-limit nan", "--stall-limit': expected a finite number, got nan"),
        ("bench train --seconds nan", "--seconds': expected a finite number, got nan"),
        ("models promote models:/a@b --floor nan", "--floor': expected a finite number, got nan"),
        ("evaluate a --scales 99999999999999999999", "expected numbers of pixels up to 16,384, each once"),
        ("evaluate a --scales 96,96", "expected numbers of pixels up to 16,384, each once"),
        ("evaluate a --scales 96,", "expected numbers of pixels up to 16,384, each once"),
        ("features a tests --out f --scales 99999999999999999999", "expected numbers of pixels up to 16,384, ascending"),
        ("features a tests --out f --scales 1000000000", "expected numbers of pixels up to 16,384, ascending"),
    ],
)
def test_a_number_out_of_all_bounds_is_a_usage_error(words: str, says: str) -> None:
    done = CliRunner().invoke(vggrow, words.split())

    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.split())
