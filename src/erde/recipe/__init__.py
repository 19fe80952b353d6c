"""The recipe: its keys, their defaults and checks, and how it is read. No torch. May import: policy, common."""
