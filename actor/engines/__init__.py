"""Clients of inference servers (SGLang, or the embedded one in actor/engine): a client of one, a pool of several."""
