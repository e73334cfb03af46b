"""Memory plans: a run's steps are rehearsed on tensors without values, and every byte is counted as an allocator would."""
