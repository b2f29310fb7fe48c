"""The embedded inference server: SGLang's HTTP API over a transformers model on the CPU. Its clients: actor/engines."""
