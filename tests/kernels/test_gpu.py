"""The same cases on a GPU, and what only a GPU has: streams and several launches in flight."""

import pytest
import torch

from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import assert_close, randn
from tests.kernels.cases_chain import *  # noqa: F403
from tests.kernels.cases_group import *  # noqa: F403
from tests.kernels.cases_linear import *  # noqa: F403
from tests.kernels.cases_model import *  # noqa: F403
from tests.kernels.cases_quantize import *  # noqa: F403
from tests.kernels.cases_quantized_scan import *  # noqa: F403
from tests.kernels.cases_scan import *  # noqa: F403
from tests.kernels.cases_scan_dynamic_outlier import *  # noqa: F403
from tests.kernels.cases_tuning import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


def test_kernels_run_on_the_current_stream() -> None:
    """The scan's input is made on a side stream, behind a wait: another stream would not see it."""
    shape = (4, 64, 50)
    u, delta, B, C = (randn(seed, *shape).cuda() for seed in range(4))
    A = -randn(5, 64, 64).abs().cuda()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = u * 2
        found = torch.ops.ouro.selective_scan(late, delta.abs(), A, B, C)
    stream.synchronize()
    expected = selective_scan_ref(*(t.cpu() for t in (u * 2, delta.abs(), A, B, C)))
    assert_close(found.cpu(), expected, 1e-5)
