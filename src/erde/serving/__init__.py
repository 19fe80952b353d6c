"""Bundles behind the Open Inference Protocol v2, over HTTP and gRPC. May import: runtime, bundle, policy, common."""
