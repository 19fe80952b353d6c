"""From logits to thresholds with a promise. No torch. May import: runtime, bundle, policy, common."""
