"""Pages (templates, style and scripts), figures and tables from results. No torch.

May import: evaluation and what lies below it.
"""
