"""DeepSpeed ZeRO under Lightning. No other package uses private names of DeepSpeed, Lightning or torch."""
