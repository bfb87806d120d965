"""The historic location of the server; the package is `pymllm_server`."""
