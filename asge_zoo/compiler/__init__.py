"""From a spec to a LocalGraph: trace the backbone, cut it into units, attach rule and prediction."""
