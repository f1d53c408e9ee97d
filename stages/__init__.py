"""The stages of the pipeline, and the code they share; `pipeline.stage_list` lists the stages."""
