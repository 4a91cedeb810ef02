"""What a run tells: records of each rank, statistics, metrics, the lines that a person reads."""
