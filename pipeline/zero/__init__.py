"""DeepSpeed ZeRO under Lightning. The only package that uses what DeepSpeed, Lightning or torch do not promise."""
