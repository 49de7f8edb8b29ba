"""The plugin in the real vLLM: `make test-vllm`."""
