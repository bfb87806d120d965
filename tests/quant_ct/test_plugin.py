"""The plugin loads."""

from __future__ import annotations

from pymllm_core.plugins import discover


def test_the_plugin_is_found_and_did_nothing_wrong() -> None:
    found = discover()
    assert "pymllm-quant-ct" in {plugin.name for plugin in found.distributions}
    assert not [failure for failure in found.failures if failure.distribution == "pymllm-quant-ct"]
