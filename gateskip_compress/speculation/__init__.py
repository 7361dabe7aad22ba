"""Self-speculative decoding: `accept` holds the rule, `decode` drafts and verifies, `transform` is the step."""
