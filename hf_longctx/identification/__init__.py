METHOD = "mean_rank"  # the default: the best order of heads on every model it was tried on (docs/heads.md)
