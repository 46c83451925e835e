"""``nnunet_fed report``: a run, a comparison or a coordinator's record as one HTML page. Source: ours."""
