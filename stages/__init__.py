"""The stages of the pipeline; `pipeline.stages` lists them in order."""
