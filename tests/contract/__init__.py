"""The contracts of ``nbdmirror.ports`` as tests, run against every implementation."""

import pytest

pytest.register_assert_rewrite(
    "tests.contract.disk_contract", "tests.contract.network_contract", "tests.contract.simulated"
)
