"""What one GPU can show about realplan, in stages that are timed, cut and reported each (`scripts/gpu_check.sh`)."""
