"""Where engines and model libraries meet the operators. Each subpackage needs its library; this one needs none."""
