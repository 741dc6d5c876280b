"""Programs that start runs, on this machine and through Slurm: checks before a submission, studies, the demo."""
