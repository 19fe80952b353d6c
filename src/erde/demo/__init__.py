"""A page that runs a bundle in a browser, and its small server; base install only. May import: bundle, policy, common."""
