"""The same cases on a GPU."""

import pytest

from tests.kernels.cases_linear import *  # noqa: F403
from tests.kernels.cases_model import *  # noqa: F403
from tests.kernels.cases_quantize import *  # noqa: F403
from tests.kernels.cases_scan import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
