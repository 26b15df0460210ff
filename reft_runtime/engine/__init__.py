"""How tokens are made: requests, scheduler, KV cache, runner, sampler, hooks."""
